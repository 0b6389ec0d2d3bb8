import argparse
import sys
from pathlib import Path

from tests.parity.runner import run

parser = argparse.ArgumentParser("python -m tests.parity", description="Compare with the original implementations.")
parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a family (its name is the family's) that holds cases")
sys.exit(0 if run(parser.parse_args().folders) else 1)

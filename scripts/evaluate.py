"Compare generated with real music: python scripts/evaluate.py my_songs output/samples/step-00000400 --out report.html"
import sys

from musiclab.cli import main

if __name__ == "__main__": main(["evaluate", *sys.argv[1:]])

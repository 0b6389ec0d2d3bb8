"Resample to 32 kHz, check, split 80/20 and write metadata.json: python scripts/prepare_data.py my_songs data"
import sys

from musiclab.cli import main

if __name__ == "__main__": main(["data", "convert", "--rate", "32000", "--valid", "0.2", *sys.argv[1:]])

"Turn MIDI files into tokens for HID-MuseFormer, one .pt a song: python scripts/preprocess_data.py --input MIDI --output processed_data --workers 8"
import sys

from musiclab.cli import main

if __name__ == "__main__": main(["museformer", "preprocess", "--format", "pt", *sys.argv[1:]])

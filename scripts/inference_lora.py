"Let MusicGen play with a trained adapter: python scripts/inference_lora.py --adapter output --prompt \"808 hip hop beat\" --out beat.wav"
import sys

from musiclab.cli import main

if __name__ == "__main__": main(["generate", *sys.argv[1:]])

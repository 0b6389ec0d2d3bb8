"Fine-tune MusicGen with LoRA: python scripts/train_lora.py data=my_songs model=local/musicgen-small [key=value ...] [--dry-run]"
import sys

from musiclab.cli import main

if __name__ == "__main__": main(["train", "musicgen_lora", *sys.argv[1:]])

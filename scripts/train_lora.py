"Fine-tune MusicGen with LoRA: python scripts/train_lora.py data=my_songs model=local/musicgen-small [key=value ...] [--dry-run]"
import sys

from musiclab.cli import main

main(["train", "musicgen_lora", *sys.argv[1:]])

"""Train HID-MuseFormer: python scripts/train_h800.py --data-path processed_data --model-size small
On several cards: torchrun --nproc_per_node=8 scripts/train_h800.py --data-path processed_data --model-size large --distributed"""
import sys

from musiclab.cli import main

if __name__ == "__main__": main(["museformer", "train", *sys.argv[1:]])

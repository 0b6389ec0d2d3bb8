"Train a LoRA for ACE-Step: python scripts/trainer.py --dataset_path ./zh_lora_dataset --exp_name my_style --precision bf16 --devices 2"
import sys

from musiclab.cli import main

if __name__ == "__main__": main(["ace-step", "trainer", *sys.argv[1:]])

"Make the data set of ACE-Step's trainer: python scripts/convert2hf_dataset.py --data_dir ./data --repeat_count 2000 --output_name zh_lora_dataset"
import sys

from musiclab.cli import main

if __name__ == "__main__": main(["ace-step", "convert2hf", *sys.argv[1:]])

"""Converts weights between Hugging Face and MindSpore, with the options of upstream's convert_weight.py.

python research/glm32k/convert_weight.py --model glm-n --input_path HF_DIR --output_path OUT.ckpt [--dtype fp16]
python research/glm32k/convert_weight.py --model glm-n --reversed --input_path IN.ckpt --output_path HF_DIR
"""

import sys

from mindformers_glm32k.commands import convert, run_command

if __name__ == "__main__":
    sys.exit(run_command(convert, "convert_weight.py"))

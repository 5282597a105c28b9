"""Writes LongBench as training records in the AdGen layout; takes upstream's options of this script, and more.

    python research/glm32k/glm32k_preprocess.py --data_path data --output_path out \
        --prompt_config_file dataset2prompt.json --is_longbench_e True
"""

import sys

from mindformers_glm32k.commands import preprocess, run_command

if __name__ == "__main__":
    sys.exit(run_command(preprocess, "glm32k_preprocess.py"))

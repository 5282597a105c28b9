"""A tiny GLM32K and the command that compiles it."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "research" / "glm32k" / "finetune_glm32k.yaml"
LAYERS, LENGTH, HIDDEN, HEADS, SIZE, GROUPS, FFN, VOCABULARY = 2, 64, 64, 4, 16, 2, 160, 1024
OVERRIDES = {
    "model.model_config.num_layers": LAYERS, "model.model_config.seq_length": LENGTH,
    "model.model_config.hidden_size": HIDDEN, "model.model_config.num_attention_heads": HEADS,
    "model.model_config.kv_channels": SIZE, "model.model_config.multi_query_group_num": GROUPS,
    "model.model_config.ffn_hidden_size": FFN, "model.model_config.padded_vocab_size": VOCABULARY,
    "train_dataset.max_source_length": 40, "train_dataset.max_target_length": 23,
}


def run_dryrun(output, *options, config=CONFIG, **overrides):
    """Runs `glm32k dryrun` in a process of its own; __ in an override's name stands for a dot.

    Returns:
        subprocess.CompletedProcess
    """
    command = [sys.executable, "-m", "mindformers_glm32k.cli", "dryrun", *(["--config", str(config)] if config else []),
               "--output_dir", str(output), *options]
    for key, value in {**OVERRIDES, **overrides}.items():
        command += [f"--{key.replace('__', '.')}", str(value)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          check=False)

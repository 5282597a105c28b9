"""A tiny GLM32K and the commands that compile it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "research" / "glm32k" / "finetune_glm32k.yaml"
LAYERS, LENGTH, HIDDEN, HEADS, SIZE, GROUPS, FFN, VOCABULARY = 2, 64, 64, 4, 16, 2, 160, 1024
OVERRIDES = {
    "model.model_config.num_layers": LAYERS,
    "model.model_config.seq_length": LENGTH,
    "model.model_config.hidden_size": HIDDEN,
    "model.model_config.num_attention_heads": HEADS,
    "model.model_config.kv_channels": SIZE,
    "model.model_config.multi_query_group_num": GROUPS,
    "model.model_config.ffn_hidden_size": FFN,
    "model.model_config.padded_vocab_size": VOCABULARY,
    "train_dataset.max_source_length": 40,
    "train_dataset.max_target_length": 23,
}
# optimizer sharding at this size (KB), and in a pipeline
SHARDED = {"parallel__parallel_optimizer_config": "{parallel_optimizer_threshold: 1}"}
PIPELINE = {"parallel_config__pipeline_stage": 2, "parallel_config__micro_batch_num": 4, **SHARDED}


def run_command(command, *options, config=CONFIG, sizes=None, **overrides):
    """Runs `glm32k COMMAND` on the tiny model in a process of its own; __ in an override's name stands for a dot;
    `sizes` takes the place of the tiny model's."""
    command = [
        sys.executable,
        "-m",
        "mindformers_glm32k.cli",
        command,
        *(["--config", str(config)] if config else []),
        *options,
    ]
    for key, value in {**(OVERRIDES if sizes is None else sizes), **overrides}.items():
        command += [f"--{key.replace('__', '.')}", str(value)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )


def run_dryrun(output, *options, config=CONFIG, **overrides):
    """`glm32k dryrun --output_dir output`; see `run_command`."""
    return run_command("dryrun", "--output_dir", str(output), *options, config=config, **overrides)

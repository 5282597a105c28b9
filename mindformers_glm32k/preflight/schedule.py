"""When a run saves and evaluates, and what disk space its checkpoints take."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindformers_glm32k.parallel import AXES, one_program
from mindformers_glm32k.preflight.findings import NOTE, WARNING, Finding, value_at

SAVES = ("CheckpointMonitor", "GLM32KCheckpointMonitor")
_STATE_BYTES = 8  # of a trained value: AdamW's two moments in float32
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def schedule_findings(config: Mapping[str, Any], records: int) -> Iterator[Finding]:
    """Steps of an epoch and of the run, the first checkpoint and the first evaluation, by the number of records."""
    if value_at(config, "train_dataset.packing"):
        return  # the number of sequences is known when they are planned
    runner = config.get("runner_config") or {}
    batch = runner.get("batch_size") or 1
    epochs = runner.get("epochs") or 1
    accumulate = runner.get("gradient_accumulation_steps") or 1
    parallel = (config.get("parallel_config") or {}) if config.get("use_parallel") else {}
    ways = parallel.get("data_parallel") or 1
    micro = (parallel.get("micro_batch_num") or 1) if (parallel.get("pipeline_stage") or 1) > 1 else accumulate
    step = batch * ways * micro if one_program(config) or not parallel else batch * ways * accumulate
    steps = records // step
    if not steps:
        yield Finding(
            WARNING,
            "runner_config.batch_size",
            f"{records} records are fewer than the {step} of one step: nothing would be trained",
            "lower it, or give more records",
        )
        return
    yield Finding(
        NOTE,
        "runner_config.epochs",
        f"{steps} steps an epoch ({records} records, {step} a step), {steps * epochs} in {epochs} epochs",
    )
    for index, callback in enumerate(config.get("callbacks") or ()):
        every = callback.get("save_checkpoint_steps") if isinstance(callback, Mapping) else None
        if every:
            key = f"callbacks.{index}.save_checkpoint_steps"
            if every > steps * epochs:
                message = f"{every} is beyond the run's {steps * epochs} steps: one checkpoint, at the end"
                yield Finding(WARNING, key, message, f"lower it, such as to {max(steps * epochs // 4, 1)}")
            else:
                yield Finding(NOTE, key, f"the first checkpoint after step {every}, {steps * epochs // every} in all")
    if config.get("do_eval") is True:
        every, each = config.get("eval_step_interval") or -1, config.get("eval_epoch_interval") or -1
        first = every if every > 0 else steps * each if each > 0 else None
        if first is None or first > steps * epochs:
            yield Finding(
                WARNING, "eval_step_interval", "do_eval is True, and no evaluation falls into the run", "lower it"
            )
        else:
            yield Finding(NOTE, "eval_step_interval", f"the first evaluation after step {first}")


def disk_findings(config: Mapping[str, Any], parameters: int) -> Iterator[Finding]:
    """The disk space of what will be kept, one checkpoint more while it is written, against what is free.

    Args:
        config: the configuration.
        parameters: values of the whole model.
    """
    model = value_at(config, "model.model_config")
    item = _ITEM_BYTES.get(str(model.get("param_init_type", "float16")).lower(), 4)
    pet = model.get("pet_config")
    saved = item + (0 if pet else _STATE_BYTES)
    copies = 1
    if config.get("use_parallel") and not one_program(config):
        copies = (config.get("parallel_config") or {}).get(AXES[0]) or 1
    for index, callback in enumerate(config.get("callbacks") or ()):
        if not isinstance(callback, Mapping) or callback.get("type") not in SAVES:
            continue
        if callback.get("save_trainable_params") and pet:
            continue
        keep = callback.get("keep_checkpoint_max") or 5
        needed = parameters * saved * copies * (keep + 1)
        folder = Path(config.get("output_dir") or "./output").absolute()
        while not folder.exists():
            folder = folder.parent
        key, free = f"callbacks.{index}.keep_checkpoint_max", shutil.disk_usage(folder).free
        text = f"{keep} checkpoints of {_size(parameters * saved * copies)} and one being written: {_size(needed)}"
        if needed > free:
            fix = "keep fewer, or set output_dir to another disk"
            yield Finding(WARNING, key, f"{text}, and {folder} has {_size(free)}", fix)
        else:
            yield Finding(NOTE, key, f"{text} of {_size(free)} free in {folder}")


def _size(nbytes):
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"

"""A run's data against its model: vocabulary, lengths, and packed data that an NPU's flash attention can take; records
truncated, cost of padding, gain of packing; steps of the run, its first checkpoint and evaluation, and the disk space
of its checkpoints."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import AXES, one_program, packing_problems
from mindformers_glm32k.preflight.findings import ERROR, NOTE, WARNING, Finding, value_at

if TYPE_CHECKING:
    from mindformers.tools.register import MindFormerConfig

MOST_LOOKED_AT = 400  # records; evenly spread over the data where there are more
_WORTH_PACKING = 1.5  # times fewer sequences
SAVES = ("CheckpointMonitor", "GLM32KCheckpointMonitor")
_STATE_BYTES = 8  # per trained value: AdamW's two moments in float32
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def check_dataset(config: MindFormerConfig, section: str) -> None:
    """Refuses a data set (train_dataset, eval_dataset) whose vocabulary or sequences the model has no room for."""
    from mindformers.models.build_tokenizer import build_tokenizer

    from mindformers_glm32k.data.dataset import check_vocabulary, sequence_length

    dataset, model = config[section], config.model.model_config
    length = sequence_length(dataset)
    if length > model.seq_length:
        raise InputError(
            f"{section}: sequences have {length} tokens (max_source_length {dataset.max_source_length} + "
            f"max_target_length {dataset.max_target_length} + 1), more than model_config.seq_length="
            f"{model.seq_length}; lower them or raise seq_length"
        )
    check_vocabulary(build_tokenizer(copy.deepcopy(dataset.tokenizer)), model.padded_vocab_size)


def check_packing(config: MindFormerConfig, sections: Iterable[str]) -> None:
    """Refuses packed data that cannot work, and limits the documents of the data sets' sequences to those that the
    compiled program has room for.

    Args:
        config: the merged configuration; `documents_per_row` of the data sets is set where it is not given.
        sections: the data sets of the run: train_dataset, eval_dataset.

    Raises:
        InputError: names the keys.
    """
    from mindformers_glm32k.config import GLM32KConfig

    packed = {
        name: section
        for section in sections
        for name, section in _copies(config, section)
        if section and section.get("packing")
    }
    if not packed:
        return
    model = GLM32KConfig(**config.model.model_config)
    if model.use_portable_cells or not model.use_flash_attention:
        return
    found = packing_problems(config)
    for name, section in packed.items():
        wanted = section.get("documents_per_row")
        if wanted is None:
            section.documents_per_row = model.documents_per_row
        elif isinstance(wanted, int) and wanted > model.documents_per_row:
            found.append(
                f"{name}.documents_per_row={wanted}: the program has places for model_config.documents_per_row="
                f"{model.documents_per_row} documents of a sequence; raise that, or lower this"
            )
    if found:
        raise InputError("packing: " + "; ".join(found))


def _copies(config: MindFormerConfig, section: str) -> Iterator[tuple]:
    """(name, section): upstream keeps a second copy of each in the section of its task."""
    yield section, config.get(section)
    task = config.get(f"{section}_task") or {}
    yield f"{section}_task.dataset_config", task.get("dataset_config")


def records_findings(config: Mapping[str, Any], section: str) -> tuple[list[Finding], int | None]:
    """Findings about the data set of `section` (train_dataset, eval_dataset), and its number of records; None where no
    data is given or it cannot be read."""
    values, model = config[section], config["model"]["model_config"]
    vocab_file = value_at(values, "tokenizer.vocab_file")
    dataset_dir = value_at(values, "data_loader.dataset_dir")
    found = []
    for key, path in (
        (f"{section}.tokenizer.vocab_file", vocab_file),
        (f"{section}.data_loader.dataset_dir", dataset_dir),
    ):
        if path and not os.path.exists(path):
            found.append(Finding(ERROR, key, f"{path}: no such file or folder", f"seen from {os.getcwd()}"))
    if found or not (vocab_file or dataset_dir):
        return found, None
    if not vocab_file or not dataset_dir:
        missing = "data_loader.dataset_dir" if vocab_file else "tokenizer.vocab_file"
        return [Finding(NOTE, f"{section}.{missing}", "not given, the data is not looked at", "")], None
    try:
        return _look(values, model, section)
    except InputError as error:
        return [Finding(ERROR, section, str(error))], None


def _look(values, model, section):
    from mindformers.dataset.dataloader import build_dataset_loader
    from mindformers.tools.register import MindFormerConfig

    from mindformers_glm32k.data.dataset import check_vocabulary, checked, sequence_length
    from mindformers_glm32k.data.encode import SampleEncoder
    from mindformers_glm32k.data.loader import samples_of
    from mindformers_glm32k.tokenizer import GLM32KTokenizer

    section_config = checked(MindFormerConfig(**copy.deepcopy(dict(values))))
    length = sequence_length(section_config)
    if length > model["seq_length"]:
        message = f"sequences have {length} tokens, more than model_config.seq_length={model['seq_length']}"
        return [Finding(ERROR, f"{section}.max_source_length", message, "lower it, or raise seq_length")], None
    tokenizer = GLM32KTokenizer(values["tokenizer"]["vocab_file"])
    check_vocabulary(tokenizer, model["padded_vocab_size"])
    loader = MindFormerConfig(**dict(values["data_loader"], column_names=["sample"]))
    samples = samples_of(build_dataset_loader(loader))
    encoder = SampleEncoder(
        tokenizer,
        section_config.max_source_length,
        section_config.max_target_length,
        length,
        section_config.truncation,
        "drop",
    )
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), MOST_LOOKED_AT)).astype(int))
    encoded = [encoder.encode(samples[int(index)]) for index in chosen]
    return list(_lengths(section_config, section, samples, chosen, encoded, length)), len(samples)


def _lengths(values, section, samples, chosen, encoded, length) -> Iterator[Finding]:
    from mindformers_glm32k.data.packing import first_fit

    of = (
        f"{len(chosen)} records looked at of {len(samples)}"
        if len(chosen) < len(samples)
        else f"{len(samples)} records"
    )
    dropped = [int(index) for index, one in zip(chosen, encoded) if one.dropped]
    if dropped:
        severity = ERROR if values.on_long_answer == "raise" and values.truncation != "drop" else WARNING
        yield Finding(
            severity,
            f"{section}.max_target_length",
            f"{of}: {len(dropped)} too long for a sequence of {length} tokens whatever is truncated, the first at "
            f"{samples.location(dropped[0])}",
            "raise the lengths, or set on_long_answer: drop to leave them out",
        )
    cut = [one for one in encoded if not one.dropped and one.tokens_after < one.tokens_before]
    longest = max(one.tokens_before for one in encoded)
    if cut:
        yield Finding(
            WARNING,
            f"{section}.max_source_length",
            f"{of}: {len(cut)} truncated ({values.truncation}), the longest has {longest} tokens",
            f"raise max_source_length={values.max_source_length} where the model's seq_length has room, or accept it",
        )
    kept = [one.tokens_after for one in encoded if one.tokens_after]
    if not kept:
        return
    padding = 1 - sum(kept) / (len(kept) * length)
    packed = len(first_fit(np.array(kept, np.int64), length))
    text = f"{of}: {min(kept)} to {max(kept)} tokens in sequences of {length}, {padding:.0%} padding"
    if values.packing:
        yield Finding(NOTE, f"{section}.packing", f"{text} without packing; packed {len(kept) / packed:.1f} a sequence")
    elif len(kept) / packed >= _WORTH_PACKING:
        fix = f"packing: True would put {len(kept) / packed:.1f} records into a sequence"
        yield Finding(NOTE, f"{section}.packing", text, fix)
    else:
        yield Finding(NOTE, section, text)


def schedule_findings(config: Mapping[str, Any], records: int) -> Iterator[Finding]:
    """Steps of an epoch and of the run, the first checkpoint and the first evaluation, by the number of records."""
    if value_at(config, "train_dataset.packing"):
        return  # the number of sequences is known only when packing is planned
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
    """Disk space of the checkpoints that will be kept, and of one more while it is written, against the free space.

    Args:
        config: the configuration.
        parameters: number of values of the whole model.
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

"""A run's records against its lengths: how many are truncated, what padding costs, what packing would save; and how
many steps they make."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.preflight.findings import ERROR, NOTE, WARNING, Finding, value_at

MOST_LOOKED_AT = 400  # records; evenly spread over the data where there are more
_WORTH_PACKING = 1.5  # times fewer sequences


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

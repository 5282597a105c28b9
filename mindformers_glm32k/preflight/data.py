"""A run's data sets against its model: vocabulary, lengths, and what an NPU's flash attention takes of packed data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mindformers_glm32k.config import GLM32KConfig
from mindformers_glm32k.data.dataset import check_vocabulary, sequence_length
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import packing_problems

if TYPE_CHECKING:
    from mindformers.tools.register import MindFormerConfig


def check_dataset(config: MindFormerConfig, section: str) -> None:
    """Refuses a data set (train_dataset, eval_dataset) whose vocabulary or sequences the model has no room for."""
    from mindformers.models.build_tokenizer import build_tokenizer

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
    """Refuses packed data that cannot work, and lets the data sets put no more documents into a sequence than the
    program has places for.

    Args:
        config: the merged configuration; `documents_per_row` of the data sets is set where it is not given.
        sections: the data sets of the run: train_dataset, eval_dataset.

    Raises:
        InputError: names the keys.
    """
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

"""Packed data against what an NPU's flash attention takes, before a run."""

from mindformers_glm32k.config import GLM32KConfig
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import packing_problems


def check_packing(config, sections):
    """Refuses what cannot work, and lets the packed data sets put no more documents into a row than the program has
    places for.

    Args:
        config (MindFormerConfig): the merged configuration; `documents_per_row` of the data sets is set where it is not
            given.
        sections (list[str]): the data sets of the run: train_dataset, eval_dataset.

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
                f"{model.documents_per_row} documents of a row; raise that, or lower this"
            )
    if found:
        raise InputError("packing: " + "; ".join(found))


def _copies(config, section):
    """(name, section): upstream keeps a second copy of each in the section of its task."""
    yield section, config.get(section)
    task = config.get(f"{section}_task") or {}
    yield f"{section}_task.dataset_config", task.get("dataset_config")

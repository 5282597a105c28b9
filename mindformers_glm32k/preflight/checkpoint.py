"""Compares a checkpoint file with a network before anything is loaded: MindFormers loads what fits and trains the
rest from random numbers without a word."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mindformers_glm32k.errors import InputError

if TYPE_CHECKING:
    from mindspore import nn

_SHOWN = 5


def check_checkpoint(path: str, network: nn.Cell) -> None:
    """Refuses a checkpoint whose weights are not those of the network.

    Folders (per-rank or per-layer files) are left to MindFormers, which knows their layout.

    Raises:
        InputError: missing, extra or misshapen parameters, all named with their shapes.
    """
    if not os.path.isfile(path):
        return
    from mindformers_glm32k.weights.checkpoint import read_index

    stored = {name: tuple(shape) for name, (shape, _) in read_index(path).items()}
    wanted, optional = _parameters(network)
    problems = []
    missing = [name for name in wanted if name not in stored]
    extra = [
        name for name in stored if name not in wanted and name not in optional and not _is_state(name, stored[name])
    ]
    shapes = [
        f"{name} is {stored[name]} in the file, {shape} in the model"
        for name, shape in {**wanted, **optional}.items()
        if name in stored and stored[name] != shape
    ]
    for what, names in (("missing", missing), ("not in the model", extra), ("of another shape", shapes)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
    if problems:
        raise InputError(
            f"{path} does not fit the model: {'; '.join(problems)}. Check model_config (num_layers, sizes, "
            "qkv_concat and mlp_concat must be those the file was made with; `glm32k convert` writes "
            "either layout)"
        )


def _is_state(name: str, shape: tuple) -> bool:
    """Whether an entry is an optimizer state or one of the trainer's counters: scalars such as epoch_num."""
    from mindformers_glm32k.weights.names import STATE_PREFIXES

    return name.startswith(STATE_PREFIXES) or ("." not in name and shape in ((), (1,)))


def _parameters(network: nn.Cell) -> tuple[dict, dict]:
    """Names and shapes that a checkpoint must have, and those it may have (LoRA adapters, caches)."""
    wanted, optional = {}, {}
    for parameter in network.get_parameters():
        may_lack = "mindpet_delta" in parameter.name or parameter.name.endswith(("key_cache", "value_cache"))
        (optional if may_lack else wanted)[parameter.name] = tuple(parameter.shape)
    return wanted, optional

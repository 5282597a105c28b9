"""Compares a checkpoint file with a network before anything is loaded: MindFormers loads what fits and trains the
rest from random numbers without a word."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.preflight.findings import ERROR, NOTE, WARNING, Finding

if TYPE_CHECKING:
    from mindspore import nn

    from mindformers_glm32k.weights.model_dims import ModelDims

_SHOWN = 5
_LOOKED_AT_BYTES = 64 << 20  # of values, in search of NaN
_PATH = "load_checkpoint"


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


def checkpoint_findings(path: str, config: Mapping[str, Any], dims: ModelDims) -> list[Finding]:
    """A checkpoint against the model, by the lists of what its files hold: names, shapes, dtypes, rank files complete
    and of one step, and NaN in a sample of the values. No network is built.

    Args:
        path: a file, a Hugging Face folder, or a folder with rank_N subfolders.
        config: the run's configuration.
        dims: the model's.
    """
    from mindformers_glm32k.weights.checkpoint import check_against, open_source, read_file, weights_in, weights_of
    from mindformers_glm32k.weights.rank_files import choose

    if not isinstance(path, str) or not os.path.exists(path):
        hint = f"seen from {os.getcwd()}; training leaves checkpoints in output/checkpoint/rank_N"
        return [Finding(ERROR, _PATH, f"{path}: no such file or folder", hint)]
    found = []
    try:
        if os.path.isdir(path) and any(name.startswith("rank_") for name in os.listdir(path)):
            chosen, remarks = choose(path)
            found.append(Finding(NOTE, _PATH, f"{chosen.name} of {len(chosen.files)} ranks is the newest complete one"))
            found += [Finding(WARNING, _PATH, remark) for remark in remarks if remark.startswith("left out")]
            if len(chosen.files) > 1:
                return found  # shards of a layout: their shapes are the strategy's
            tensors = next(iter(chosen.tensors.values()))
            check_against(dims, weights_in(tensors), path)
        elif os.path.isdir(path):
            tensors = open_source(path).tensors
            check_against(dims, weights_of(open_source(path))[0], path)
        else:
            tensors = {tensor.name: tensor for tensor in read_file(path)}
            check_against(dims, weights_in(tensors), path)
    except InputError as error:
        hint = "check model_config, or load the checkpoint that belongs to it"
        return [*found, Finding(ERROR, _PATH, " ".join(str(error).split()), hint)]
    found += _value_findings(path, tensors, config)
    return found


def _value_findings(path, tensors, config):
    from mindformers_glm32k.weights.tensors import FROM_MINDSPORE, ITEM_SIZE, TO_CONFIG

    dtypes, bad, looked_at = set(), [], 0
    for tensor in sorted(tensors.values(), key=lambda tensor: prod(tensor.shape)):
        dtype = FROM_MINDSPORE.get(tensor.dtype, tensor.dtype)
        if dtype not in ITEM_SIZE or _is_state(tensor.name, tensor.shape):
            continue
        dtypes.add(TO_CONFIG[dtype])
        looked_at += prod(tensor.shape) * ITEM_SIZE[dtype]
        if looked_at <= _LOOKED_AT_BYTES and not _is_finite(tensor.raw_bytes(), dtype):
            bad.append(tensor.name)
    if bad:
        yield Finding(
            ERROR, _PATH, f"{path}: NaN or infinity in {len(bad)} tensors, {bad[0]} first", "take an earlier checkpoint"
        )
    wanted = str((config["model"]["model_config"]).get("param_init_type") or "float16").lower()
    if dtypes and dtypes != {wanted}:
        text = f"holds {' and '.join(sorted(dtypes))}, the model's parameters are {wanted}"
        yield Finding(NOTE, _PATH, text, "MindSpore casts when it loads")


def _is_finite(raw, dtype):
    if dtype == "bf16":
        return not bool(((np.frombuffer(raw, "<u2") & np.uint16(0x7F80)) == np.uint16(0x7F80)).any())
    return bool(np.isfinite(np.frombuffer(raw, {"fp32": "<f4", "fp16": "<f2"}[dtype])).all())

"""Compares a checkpoint file with a network before anything is loaded: MindFormers loads what fits and silently
trains the rest from random values."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.preflight.findings import ERROR, NOTE, WARNING, Finding

if TYPE_CHECKING:
    from mindspore import nn

    from mindformers_glm32k.weights.names import ModelDims

_SHOWN = 5
_LOOKED_AT_BYTES = 64 << 20  # of values that are searched for NaN and infinity
_PATH = "load_checkpoint"


def check_checkpoint(path: str, network: nn.Cell) -> None:
    """Refuses a checkpoint whose weights are not those of the network.

    Folders (per-rank or per-layer files) are left to MindFormers, which knows their layout.

    Raises:
        InputError: missing, extra or misshapen parameters, all named with their shapes; NaN or infinity in one.
    """
    if not os.path.isfile(path):
        return
    from mindformers_glm32k.weights.checkpoint import read_index

    problem = _misfit(
        path, {name: tuple(shape) for name, (shape, _) in read_index(path).items()}, *_parameters(network)
    )
    if problem:
        raise InputError(problem)
    check_finite(path)


def check_finite(path: str | os.PathLike) -> None:
    """Refuses a file in which a weight is NaN or infinite: every answer and loss would be.

    All values are read, but once per process, though both the choice of a checkpoint and the network ask; loading reads
    them again from the page cache.
    """
    stat = os.stat(path)
    bad = _first_bad_tensor(os.path.realpath(path), stat.st_size, stat.st_mtime_ns)
    if bad:
        raise InputError(
            f"load_checkpoint {path}: {bad} is the first parameter with NaN or infinity; take an earlier checkpoint"
        )


@functools.lru_cache(maxsize=1)
def _first_bad_tensor(path, _size, _time):
    from mindformers_glm32k.weights.checkpoint import first_bad_tensor

    return first_bad_tensor(path)


def _misfit(path, stored, wanted, optional):
    """How the shapes in a checkpoint differ from those that a model must have, and may have; None where they fit."""
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
    if not problems:
        return None
    return (
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
    """Checks a checkpoint against the model without building a network: names, shapes, dtypes, rank files complete and
    of one step, and NaN in a sample of the values.

    Args:
        path: a file, a Hugging Face folder, or a folder with rank_N subfolders.
        config: the run's configuration.
        dims: the model's.
    """
    from mindformers_glm32k.weights.checkpoint import check_against, open_source, read_file, weights_of
    from mindformers_glm32k.weights.names import STATE_PREFIXES
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
                return found  # shards: their shapes depend on the strategy
            path, tensors = str(chosen.files[0]), chosen.tensors[0]
        elif os.path.isdir(path):
            source = open_source(path)
            check_against(dims, weights_of(source)[0], path)
            found += _setting_findings(os.path.join(path, "config.json"), config)
            return [*found, *_value_findings(path, source.tensors, config)]
        else:
            tensors = {tensor.name: tensor for tensor in read_file(path)}
    except InputError as error:
        hint = "check model_config, or load the checkpoint that belongs to it"
        return [*found, Finding(ERROR, _PATH, " ".join(str(error).split()), hint)]
    foreign = _foreign(tensors)
    problem = None
    if foreign:
        problem, hint = f"{path} has Hugging Face's names, such as {foreign}", "give the folder that it lies in"
    else:
        problem, hint = _misfit(path, *_shapes(tensors, config, dims)), ""
    if problem:
        return [*found, Finding(ERROR, _PATH, problem, hint)]
    if config.get("resume_training") and not any(name.startswith(STATE_PREFIXES) for name in tensors):
        hint = "resume from a checkpoint that training wrote, or set resume_training: False to start from these weights"
        found.append(Finding(ERROR, "resume_training", f"{path} has no optimizer states", hint))
    found += _setting_findings(os.path.splitext(path)[0] + ".report.json", config)
    return [*found, *_value_findings(path, tensors, config)]


def _setting_findings(path, config):
    """Settings that shapes do not show, in a config.json or a conversion's report, that the run's model_config
    contradicts."""
    from mindformers_glm32k.weights.config_json import disagreements, read_config

    if not os.path.isfile(path):
        return
    try:
        published = read_config(path).fields
    except InputError:  # another program's file
        return
    for key, (theirs, ours) in disagreements(published, config["model"]["model_config"]).items():
        hint = f"load the checkpoint of this model, or set {key}: {theirs}"
        yield Finding(ERROR, f"model.model_config.{key}", f"{ours}, and {path} says {theirs}", hint)


def _foreign(tensors):
    """A weight under a name that is not MindFormers', None where there is none."""
    from mindformers_glm32k.weights.names import key_of, name_of

    for name in tensors:
        try:
            key = key_of(name)
        except InputError:  # an adapter, or a parameter of an extended model
            continue
        if key is not None and name_of(key, "mindspore") != name:
            return name
    return None


def _shapes(tensors, config, dims):
    """What is stored, what the model must have and what it may have: {name: shape} each."""
    from mindformers_glm32k.weights.names import model_keys, name_of

    model = config["model"]["model_config"]
    concat = [model.get(key, True) is not False for key in ("qkv_concat", "mlp_concat")]
    keys = model_keys(dims.num_layers, dims.qkv_bias, *concat)
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    adapters = {name: shape for name, shape in stored.items() if "mindpet_delta" in name and model.get("pet_config")}
    caches = {name: shape for name, shape in stored.items() if name.endswith(("key_cache", "value_cache"))}
    return stored, {name_of(key, "mindspore"): dims.shape(key) for key in keys}, {**adapters, **caches}


def _value_findings(path, tensors, config):
    from mindformers_glm32k.weights.tensors import CARRIER, FROM_MINDSPORE, ITEM_SIZE, TO_CONFIG, count_not_finite

    dtypes, bad, looked_at = set(), [], 0
    for tensor in sorted(tensors.values(), key=lambda tensor: prod(tensor.shape)):
        dtype = FROM_MINDSPORE.get(tensor.dtype, tensor.dtype)
        if dtype not in ITEM_SIZE or _is_state(tensor.name, tensor.shape):
            continue
        dtypes.add(TO_CONFIG[dtype])
        looked_at += prod(tensor.shape) * ITEM_SIZE[dtype]
        if looked_at <= _LOOKED_AT_BYTES:
            values = np.frombuffer(tensor.raw_bytes(), CARRIER[dtype])
            bad += [tensor.name] if count_not_finite(values, dtype) else []
    if bad:
        yield Finding(
            ERROR, _PATH, f"{path}: NaN or infinity in {len(bad)} tensors, {bad[0]} first", "take an earlier checkpoint"
        )
    wanted = str((config["model"]["model_config"]).get("param_init_type") or "float16").lower()
    if dtypes and dtypes != {wanted}:
        text = f"holds {' and '.join(sorted(dtypes))}, the model's parameters are {wanted}"
        yield Finding(NOTE, _PATH, text, "MindSpore casts when it loads")

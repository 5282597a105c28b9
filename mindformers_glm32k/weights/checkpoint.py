"""A checkpoint of any format: its files found, listed, and checked against their index and the model; and the plan of
which values go where in another layout, made before anything is written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.finding import HOW_TO_MERGE, find_files
from mindformers_glm32k.weights.formats import read_ckpt, read_safetensors
from mindformers_glm32k.weights.names import (
    MLP,
    QKV,
    QKV_BIAS,
    STATE_PREFIXES,
    ModelDims,
    TensorKey,
    foreign_kind,
    key_of,
    model_keys,
    name_of,
    unwrapped,
)
from mindformers_glm32k.weights.tensors import ITEM_SIZE, StoredTensor, TensorSpec, count_not_finite, same_bits
from mindformers_glm32k.weights.torch_bin import read_torch

# suffix -> reader that lists a file's tensors
_READERS = {".safetensors": read_safetensors, **dict.fromkeys((".bin", ".pt", ".pth"), read_torch), ".ckpt": read_ckpt}
_FAMILY = {part: family for family in (QKV, QKV_BIAS, MLP) for part in family}
_MOST_NAMED = 12  # problems spelled out in one message


@dataclass(frozen=True)
class Source:
    """A checkpoint: its files and every tensor in them.

    Args:
        path: as the user gave it.
        files: the weight files, in order.
        tensors: by name, in file order.
        config: the config.json beside them, None where there is none.
        notes: what was passed over in finding the files, and why.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    config: Path | None
    notes: tuple[str, ...] = ()


def read_file(path: str | os.PathLike) -> list[StoredTensor]:
    """Lists the tensors of one weight file, the reader chosen by its suffix.

    Raises:
        InputError: missing, empty, a Git LFS pointer, of an unknown kind, or broken.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise InputError(f"{path}: unknown kind of weight file {path.suffix!r}; known are {', '.join(_READERS)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; download it again")
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path}: the file is empty; download it again")
    if size < 1024:
        try:
            head = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        if head.startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    try:
        return _READERS[path.suffix](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_index(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], str]]:
    """The (shape, dtype) of a weight file's tensors, by name, in file order; see `read_file`."""
    return {tensor.name: (tensor.shape, tensor.dtype) for tensor in read_file(path)}


def first_bad_tensor(path: str | os.PathLike) -> str | None:
    """The first weight with NaN or infinity in a file, None without one. Optimizer states are not checked: a step
    whose gradients are finite leaves them finite.

    Raises:
        InputError: the file is broken.
    """
    for tensor in read_file(path):
        if tensor.dtype not in ITEM_SIZE or tensor.name.startswith(STATE_PREFIXES) or "." not in tensor.name:
            continue
        if any(count_not_finite(chunk, tensor.dtype) for chunk in tensor.chunks()):
            return tensor.name
    return None


def open_source(path: str | os.PathLike) -> Source:
    """Finds the files of a checkpoint (a folder, one weight file, or an index file) and lists their tensors; no values
    are read.

    Raises:
        InputError: nothing there, shards missing, or files and index contradict each other.
    """
    path = Path(path)
    chosen, index, folder, notes = find_files(path)
    tensors = {}
    for file in chosen:
        for tensor in read_file(file):
            if tensor.name in tensors:
                raise InputError(
                    f"{file}: key {tensor.name!r} is also in {tensors[tensor.name].file.name}; one of "
                    "the two files does not belong here"
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _compare_with_index(index, tensors, folder)
    config = folder / "config.json"
    return Source(path, tuple(chosen), tensors, config if config.is_file() else None, tuple(notes))


def _compare_with_index(index, tensors, folder):
    for name, file in index.items():
        tensor = tensors.get(name)
        if tensor is None and key_of(unwrapped(name)[0]) is None:
            continue  # a buffer that newer files leave out
        if tensor is None:
            raise InputError(
                f"{folder / file}: key {name!r} is missing from it, the index says that it is there; "
                "the shard belongs to another checkpoint: download it again"
            )
        if tensor.file.name != file:
            raise InputError(
                f"{tensor.file}: key {name!r} is in this shard, the index expects it in {file}: shards "
                "were renamed or swapped; download both again"
            )
    extra = sorted(set(tensors) - set(index))
    if extra:
        first = tensors[extra[0]]
        raise InputError(
            f"{first.file}: key {first.name!r} is in this shard but not in the index "
            f"({len(extra)} such keys); the shard belongs to another checkpoint: download it again"
        )


def weights_of(source: Source) -> tuple[dict[TensorKey, StoredTensor], list[str], list[str]]:
    """The weights of a source, the names of its other tensors, and notes on prefixes removed and on duplicates.

    Raises:
        InputError: adapters, unknown names, weights of other dtypes, or a part that occurs twice with different values.
    """
    _refuse_adapters(source)
    weights, skipped, problems, wrappers, twice = {}, [], [], Counter(), []
    for name, tensor in source.tensors.items():
        plain, wrapper = unwrapped(name)
        try:
            key = key_of(plain)
        except InputError as error:
            problems.append(f"{tensor.file}: {error}")
            continue
        if key is None:
            skipped.append(name)
            continue
        wrappers[wrapper] += 1
        if tensor.dtype not in ITEM_SIZE:
            problems.append(
                f"{tensor.file}: key {name!r} has dtype {tensor.dtype}, {', '.join(ITEM_SIZE)} are "
                "understood; quantized weights cannot be converted"
            )
        elif key in weights:
            twice.append(([tensor], weights[key]))
        else:
            weights[key] = tensor
    twice += _take_fused(weights)
    for split, whole in twice:
        if not _equal_values(split, whole):
            problems.append(
                f"{split[0].file}: key {split[0].name!r} holds what {whole.name!r} in {whole.file.name} holds too, and "
                "the values are not equal; remove the wrong one"
            )
    raise_problems(source.path, problems)
    if not weights:
        raise InputError(f"{source.path}: no weights in it")
    notes = [f"{source.path}: {wrapper!r} is taken off {n} names" for wrapper, n in wrappers.items() if wrapper]
    notes += [
        f"{split[0].file}: key {split[0].name!r} holds the values of {whole.name!r} once more, which are taken once"
        for split, whole in twice
    ]
    return weights, skipped, notes


def _refuse_adapters(source):
    kind = foreign_kind(source.tensors)
    if kind == "ptuning":
        raise InputError(
            f"{source.path}: holds a prefix of P-Tuning v2 (prefix_encoder), which is no part of this model and cannot "
            "be converted; give the base model's folder, or fine-tune with LoRA and merge"
        )
    if kind == "peft":
        folder = source.path if source.path.is_dir() else source.path.parent
        raise InputError(
            f"{source.path}: holds matrices of a PEFT adapter; {HOW_TO_MERGE.format(folder=folder)} "
            "(a whole PEFT model: save it with merge_and_unload() first)"
        )


def _take_fused(weights):
    """Removes split tensors from `weights` where their fused form is there too; returns (split, fused) to compare."""
    found = []
    for key in [key for key in weights if len(key.parts) > 1]:
        split = [TensorKey((part,), key.layer) for part in key.parts]
        there = [weights.pop(one) for one in split if one in weights]
        if there:
            found.append((there, weights[key]))
    return found


def _equal_values(ones, other):
    """Whether tensors, concatenated along axis 0, have the bits of `other`."""
    if {one.dtype for one in ones} != {other.dtype} or sum(one.nbytes for one in ones) != other.nbytes:
        return False
    return same_bits(np.concatenate([one.load().reshape(-1) for one in ones]), other.load().reshape(-1))


def weights_in(tensors: Mapping[str, StoredTensor]) -> dict[TensorKey, StoredTensor]:
    """The model's weights among the tensors of a training checkpoint, under any naming; other tensors are skipped."""
    found = {}
    for name, tensor in tensors.items():
        try:
            key = key_of(unwrapped(name)[0])
        except InputError:  # adapters, and parameters of an extended model
            continue
        if key is not None:
            found[key] = tensor
    return found


def check_against(dims: ModelDims, weights: Mapping[TensorKey, StoredTensor], path: object) -> None:
    """Checks that every expected weight is there with its shape, and none is left over.

    Raises:
        InputError: one message names all problems of the checkpoint at `path`.
    """
    problems, present, missing = [], {}, {}
    expected = {
        (part, key.layer): key for key in model_keys(dims.num_layers, dims.qkv_bias, True, True) for part in key.parts
    }
    for key, tensor in weights.items():
        present.update({(part, key.layer): tensor for part in key.parts})
        shape = dims.shape(key)
        if not all((part, key.layer) in expected for part in key.parts):
            problems.append(
                f"{tensor.file}: key {tensor.name!r} is left over: a model of {dims.num_layers} layers"
                f"{'' if dims.qkv_bias else ' without QKV biases'} has no such weight"
            )
        elif tensor.shape != shape:
            problems.append(f"{tensor.file}: key {tensor.name!r} has shape {tensor.shape}, expected {shape}")
    for (part, layer), key in expected.items():
        if (part, layer) not in present:
            missing.setdefault(key, []).append(part)
    for key, parts in missing.items():
        lost = [key] if len(parts) == len(key.parts) else [TensorKey((part,), key.layer) for part in parts]
        names = dict.fromkeys(name_of(one, naming) for one in lost for naming in ("chatglm", "glm"))
        problems.append(f"{path}: missing: {' or '.join(map(repr, names))}")
    raise_problems(path, problems)


def raise_problems(path: object, problems: Iterable[str]) -> None:
    """Raises one InputError about `path` that names all problems, a sentence each; does nothing without any."""
    problems = list(problems)
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        more = f"\n  … and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise InputError(f"{path}: {len(problems)} problems:\n  " + "\n  ".join(problems[:_MOST_NAMED]) + more)


@dataclass(frozen=True)
class Move:
    """Consecutive values copied from a source tensor to a target; all figures count elements."""

    source: StoredTensor
    source_start: int
    target: TensorSpec
    target_start: int
    count: int


@dataclass(frozen=True)
class TensorGroup:
    """The smallest unit of work: tensors that share parts, as Q, K, V and their fused form. The moves of a target are
    in the order of its values."""

    moves: tuple[Move, ...]

    @property
    def targets(self) -> list[TensorSpec]:
        return list(dict.fromkeys(move.target for move in self.moves))

    @property
    def sources(self) -> list[StoredTensor]:
        return list(dict.fromkeys(move.source for move in self.moves))


def make_targets(
    dims: ModelDims,
    weights: Mapping[TensorKey, StoredTensor],
    naming: str,
    qkv_concat: bool,
    mlp_concat: bool,
    dtype: str | None,
) -> dict[TensorKey, TensorSpec]:
    """The tensors to write, in the model's order; without a dtype each keeps its own."""
    own = {(part, key.layer): tensor.dtype for key, tensor in weights.items() for part in key.parts}
    return {
        key: TensorSpec(name_of(key, naming), dims.shape(key), dtype or own[key.parts[0], key.layer])
        for key in model_keys(dims.num_layers, dims.qkv_bias, qkv_concat, mlp_concat)
    }


def make_groups(
    dims: ModelDims, weights: Mapping[TensorKey, StoredTensor], targets: Mapping[TensorKey, TensorSpec]
) -> list[TensorGroup]:
    """Plans which source values go where, in the order of the source files' bytes, so that disks are read forward."""
    sources, locations = {}, {}
    for key, tensor in weights.items():
        sources.update(_locate_parts(dims, key, tensor))
    for key, target in targets.items():
        locations.update(_locate_parts(dims, key, target))
    families = {}
    for part in locations:
        families.setdefault((_FAMILY.get(part[0], part[0]), part[1]), []).append(part)
    groups = []
    for (family, _), parts in families.items():
        moves: list[Move] = []
        for part in sorted(parts, key=lambda part: family.index(part[0]) if isinstance(family, tuple) else 0):
            source, source_start, count = sources[part]
            target, target_start, _ = locations[part]
            last = moves[-1] if moves else None
            if last and last.source is source and last.target is target:
                moves[-1] = Move(source, last.source_start, target, last.target_start, last.count + count)
            else:
                moves.append(Move(source, source_start, target, target_start, count))
        groups.append(TensorGroup(tuple(moves)))
    return sorted(groups, key=lambda group: (group.moves[0].source.file, group.moves[0].source.segments[0][0]))


def _locate_parts(dims, key, tensor):
    """Where each part of a tensor lies: (part, layer) -> (tensor, first element, elements)."""
    row, start, locations = prod(tensor.shape[1:]), 0, {}
    for part in key.parts:
        count = dims.rows(part) * row
        locations[part, key.layer] = (tensor, start, count)
        start += count
    return locations

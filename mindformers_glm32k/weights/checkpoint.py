"""The files of a checkpoint, of any format: found, listed, checked against their index, and held against the model."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.model_dims import ModelDims
from mindformers_glm32k.weights.names import TensorKey, key_of, model_keys, name_of
from mindformers_glm32k.weights.tensors import ITEM_SIZE, StoredTensor

# suffix -> module and function of formats/ that list a file's tensors; imported when there is such a file
_READERS = {
    ".safetensors": ("safetensors", "read_header"),
    **dict.fromkeys((".bin", ".pt", ".pth"), ("torch_bin", "read_torch")),
    ".ckpt": ("ckpt", "read_ckpt"),
}
INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
# In a folder the first pattern that matches wins: safetensors before .bin, whole sets before stray files.
_PATTERNS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "*.safetensors.index.json",
    "*.ckpt.index.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "*.ckpt",
)
_MOST_NAMED = 12  # problems spelled out in one message


@dataclass(frozen=True)
class Source:
    """A checkpoint: its files and every tensor in them.

    Args:
        path: as the user gave it.
        files: the weight files, in order.
        tensors: by name, in file order.
        config: the config.json beside them, None where there is none.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    config: Path | None


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
    module, function = _READERS[path.suffix]
    reader = getattr(importlib.import_module(f"mindformers_glm32k.weights.formats.{module}"), function)
    try:
        return reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_index(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], str]]:
    """The (shape, dtype) of what is in a weight file, by name, in file order; see `read_file`."""
    return {tensor.name: (tensor.shape, tensor.dtype) for tensor in read_file(path)}


def open_source(path: str | os.PathLike) -> Source:
    """Finds the files of a checkpoint (a folder, one weight file, or an index file) and lists their tensors; no values
    are read.

    Raises:
        InputError: nothing there, shards missing, or files and index contradict each other.
    """
    path = Path(path)
    if path.is_dir():
        chosen, folder = _choose(path), path
    elif path.exists():
        chosen, folder = [path], path.parent
    else:
        raise InputError(f"{path}: no such file or folder")
    index = None
    if chosen[0].name.endswith(INDEX_SUFFIX):
        index_path = chosen[0]
        index = _read_index(index_path)
        chosen = [folder / name for name in sorted(set(index.values()))]
        _require_all(chosen, index_path)
    else:
        _require_whole_set(chosen)
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
    return Source(path, tuple(chosen), tensors, config if config.is_file() else None)


def _choose(folder):
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if found and pattern.endswith(INDEX_SUFFIX) and len(found) > 1:
            raise InputError(
                f"{folder}: {len(found)} index files ({', '.join(path.name for path in found)}): give the one meant"
            )
        if found:
            return found
    raise InputError(f"{folder}: no weight files (*.safetensors, pytorch_model*.bin, *.ckpt) in this folder")


def _read_index(path):
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) and file == Path(file).name for file in weight_map.values()):
            raise ValueError("weight_map must name a file in the same folder for every key")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a usable index ({type(error).__name__}: {error}); download it again") from error
    return weight_map


def _require_all(files, index_path):
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{index_path}: {len(missing)} of {len(files)} shards are missing from its folder: "
            f"{', '.join(missing)}; download them"
        )


def _require_whole_set(files):
    """Without an index the shards' own numbering tells which are missing."""
    sets = {}
    for file in files:
        match = _SHARD.match(file.name)
        if match:
            sets.setdefault((match["stem"], match["count"], match["suffix"]), set()).add(int(match["index"]))
    for (stem, count, suffix), indices in sets.items():
        missing = [
            f"{stem}-{index:05d}-of-{count}{suffix}" for index in range(1, int(count) + 1) if index not in indices
        ]
        if missing:
            raise InputError(
                f"{files[0].parent}: {len(missing)} of {int(count)} shards are missing: "
                f"{', '.join(missing)}; download them and give the folder"
            )
    if len(sets) > 1 or (sets and sum(map(len, sets.values())) != len(files)):
        raise InputError(
            f"{files[0].parent}: files of several checkpoints lie in one folder "
            f"({', '.join(file.name for file in files)}); give the index file of the one meant"
        )


def _compare_with_index(index, tensors, folder):
    for name, file in index.items():
        tensor = tensors.get(name)
        if tensor is None and key_of(name) is None:
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


def weights_of(source: Source) -> tuple[dict[TensorKey, StoredTensor], list[str]]:
    """The weights of a source, and the names in it that are none.

    Raises:
        InputError: unknown names, weights of other dtypes, or a part that is there twice.
    """
    weights, skipped, problems, holders = {}, [], [], {}
    for name, tensor in source.tensors.items():
        try:
            key = key_of(name)
        except InputError as error:
            problems.append(f"{tensor.file}: {error}")
            continue
        if key is None:
            skipped.append(name)
            continue
        if tensor.dtype not in ITEM_SIZE:
            problems.append(
                f"{tensor.file}: key {name!r} has dtype {tensor.dtype}, {', '.join(ITEM_SIZE)} are "
                "understood; quantized weights cannot be converted"
            )
            continue
        for part in key.parts:
            other = holders.setdefault((part, key.layer), tensor)
            if other is not tensor:
                problems.append(f"{tensor.file}: key {name!r} holds what {other.name!r} in {other.file.name} holds too")
        weights[key] = tensor
    raise_problems(source.path, problems)
    if not weights:
        raise InputError(f"{source.path}: no weights in it")
    return weights, skipped


def weights_in(tensors: Mapping[str, StoredTensor]) -> dict[TensorKey, StoredTensor]:
    """The model's weights among the tensors of a training checkpoint, under any naming, whatever else lies there."""
    found = {}
    for name, tensor in tensors.items():
        try:
            key = key_of(name)
        except InputError:  # adapters, and parameters of a model that somebody extended
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

"""The files of a checkpoint, of any format: found, listed, and checked against their index."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.formats.ckpt import read_ckpt
from mindformers_glm32k.weights.formats.safetensors import read_header
from mindformers_glm32k.weights.formats.torch_bin import read_torch
from mindformers_glm32k.weights.names import slot_of
from mindformers_glm32k.weights.tensors import StoredTensor

_READERS = {".safetensors": read_header, ".bin": read_torch, ".pt": read_torch, ".pth": read_torch, ".ckpt": read_ckpt}
INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
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
    files: tuple
    tensors: dict[str, StoredTensor]
    config: Optional[Path]


def read_file(path):
    """Lists the tensors of one weight file, the reader chosen by its suffix.

    Args:
        path (str | os.PathLike): `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt`.

    Returns:
        list[StoredTensor]

    Raises:
        InputError: missing, empty, a Git LFS pointer, of an unknown kind, or broken.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
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
        return reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def open_source(path):
    """Finds the files of a checkpoint and lists their tensors; no values are read.

    Args:
        path (str | os.PathLike): a folder, one weight file, or an index file.

    Returns:
        Source

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
            sets.setdefault((match["stem"], match["count"], match["suffix"]), set()).add(int(match["number"]))
    for (stem, count, suffix), numbers in sets.items():
        missing = [f"{stem}-{n:05d}-of-{count}{suffix}" for n in range(1, int(count) + 1) if n not in numbers]
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
        if tensor is None and slot_of(name) is None:
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

"""The files to write: which tensor goes into which file, and at which bytes. All of it is known before the start."""

import json
import re
from dataclasses import dataclass

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.formats.ckpt import frame
from mindformers_glm32k.weights.formats.safetensors import build_header

FORMATS = ("ckpt", "safetensors")
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass(frozen=True)
class OutputFile:
    """One file to write.

    Args:
        name: its final name, without folder.
        size: bytes.
        framing: (offset, bytes) of everything that is not tensor values.
        segments: by tensor name, the (offset, bytes) that take its values in order.
    """

    name: str
    size: int
    framing: tuple[tuple[int, bytes], ...]
    segments: dict[str, tuple[tuple[int, int], ...]]


def parse_size(text):
    """Bytes of a size such as "5GB" (10^9) or "2GiB" (2^30); None stays None; raises InputError on anything else."""
    if text is None or isinstance(text, int):
        size = text
    else:
        match = re.match(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$", str(text))
        if not match or match[2].upper() not in _UNITS:
            raise InputError(f"max_shard_size {text!r}: a number with a unit is needed, such as 5GB or 2GiB")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size is not None and size < 1:
        raise InputError(f"max_shard_size {text!r}: at least one byte is needed")
    return size


def lay_out(targets, file_format, stem, suffix, max_shard_size, metadata):
    """Distributes tensors over files, in order, and places every byte.

    Args:
        targets (list[plan.Target]): what to write.
        file_format (str): "ckpt" or "safetensors".
        stem, suffix (str): a single file is called stem + suffix, shards stem-00001-of-0000N + suffix.
        max_shard_size (int | None): bytes of tensor values in one file, unless a single tensor is larger.
        metadata (dict[str, str]): for the safetensors header.

    Returns:
        list[OutputFile]
    """
    shards, filled = [[]], 0
    for target in targets:
        if max_shard_size is not None and shards[-1] and filled + target.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(target)
        filled += target.nbytes
    names = (
        [stem + suffix]
        if len(shards) == 1
        else [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)]
    )
    place = _place_ckpt if file_format == "ckpt" else _place_safetensors
    return [place(name, shard, metadata) for name, shard in zip(names, shards)]


def _place_ckpt(name, targets, _):
    position, framing, segments = 0, [], {}
    for target in targets:
        places = []
        for before, length in frame(target.name, target.shape, target.dtype):
            framing.append((position, before))
            places.append((position + len(before), length))
            position += len(before) + length
        segments[target.name] = tuple(places)
    return OutputFile(name, position, tuple(framing), segments)


def _place_safetensors(name, targets, metadata):
    header, offsets = build_header([(t.name, t.shape, t.dtype) for t in targets], metadata)
    segments = {target.name: ((offset, target.nbytes),) for target, offset in zip(targets, offsets)}
    return OutputFile(name, len(header) + sum(target.nbytes for target in targets), ((0, header),), segments)


def index_text(files):
    """The index of a sharded checkpoint in Hugging Face's layout.

    Args:
        files (list[OutputFile]): as laid out.

    Returns:
        str | None: JSON; None for a single file, which needs no index.
    """
    if len(files) == 1:
        return None
    weight_map = {name: file.name for file in files for name in file.segments}
    total = sum(length for file in files for places in file.segments.values() for _, length in places)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"

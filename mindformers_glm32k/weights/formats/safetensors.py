"""The safetensors format, header only: 8 bytes of length, a JSON header, then the values.

Source: https://github.com/huggingface/safetensors (README, "Format"). Values are read by StoredTensor, which never
maps or holds a whole file as the library's `safe_open` may.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.tensors import (
    FROM_SAFETENSORS,
    ITEM_SIZE,
    StoredTensor,
    open_for_reading,
    safetensors_code,
    stored_bytes,
)

_MAX_HEADER = 100_000_000  # bytes; the library's own limit
_OTHER_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def read_header(path: Path) -> list[StoredTensor]:
    """Lists the tensors of a file in the order of their data; dtypes that are no weight's keep the format's own name
    ("I64").

    Raises:
        InputError: not a safetensors file, truncated, or a header that contradicts itself or the file's size.
    """
    size = os.stat(path).st_size
    with open_for_reading(path) as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise InputError(
                f"{path}: not a safetensors file, or cut off in its header ({size} bytes, the header "
                f"claims {length}); download it again"
            )
        raw = handle.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
        if not isinstance(header, dict):
            raise ValueError(f"a JSON object is needed, found {type(header).__name__}")
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the safetensors header is corrupt ({error}); download it again") from error
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.segments[0][0])
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _unique(pairs, path):
    seen = {}
    for key, value in pairs:
        if key in seen:
            raise InputError(f"{path}: key {key!r} stands twice in the safetensors header")
        seen[key] = value
    return seen


def _entry(path, name, entry, base):
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(code, str) and all(type(n) is int and n >= 0 for n in [*shape, begin, end])):
            raise ValueError("wrong types")
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: key {name!r}: corrupt entry in the safetensors header: {entry!r}") from error
    dtype = FROM_SAFETENSORS.get(code, code)
    item = ITEM_SIZE.get(dtype) or _OTHER_SIZES.get(code)
    if item is not None and end - begin != prod(shape) * item:
        raise InputError(
            f"{path}: key {name!r}: shape {tuple(shape)} of {code} needs {prod(shape) * item} "
            f"bytes, the header gives it {end - begin}; the file is corrupt"
        )
    return StoredTensor(name, tuple(shape), dtype, path, ((base + begin, end - begin),))


def _check_layout(path, tensors, base, size):
    position = base
    for tensor in tensors:
        offset, nbytes = tensor.segments[0]
        if offset != position:
            raise InputError(
                f"{path}: key {tensor.name!r}: its data start at byte {offset}, {position} is expected; "
                "the file is corrupt"
            )
        position += nbytes
    if position != size:
        kind = "cut off" if size < position else "longer than its header says"
        late = next((t.name for t in tensors if sum(t.segments[0]) > size), None)
        raise InputError(
            f"{path}: the file is {kind}: {size} bytes, {position} expected"
            + (f"; key {late!r} is the first that is not all there" if late else "")
            + "; download it again"
        )


def build_header(
    entries: Iterable[tuple[str, tuple[int, ...], str]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The bytes before the values, padded to 8, and each tensor's offset in the file.

    Args:
        entries: name, shape, dtype, in the order of their data.
        metadata: the format's free text entries.
    """
    header, offsets, position = {"__metadata__": metadata}, [], 0
    for name, shape, dtype in entries:
        nbytes = stored_bytes(shape, dtype)
        header[name] = {
            "dtype": safetensors_code(dtype),
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        offsets.append(position)
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [base + offset for offset in offsets]

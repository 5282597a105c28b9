"""The two file formats that are written as well as read: MindSpore's .ckpt and safetensors.

Each has a function that lists a file's tensors (StoredTensor reads their values) and one that returns the bytes around
the values to write, so that values are streamed to known offsets; `mindspore.save_checkpoint` holds all values in
memory, and the safetensors library's `safe_open` may map a whole file.

A .ckpt is a protobuf `Checkpoint` (schema: mindspore/ccsrc/utils/checkpoint.proto): field 1, repeated, a `Value` of
tag (1) and tensor (2); the tensor of dims (1), tensor_type (2) and tensor_content (3). Large tensors are several
consecutive values of one tag, each with the full dims and a slice of the content. With crc_check the file ends in
`crc_num` and ten bytes.

A safetensors file is 8 bytes of length, a JSON header, then the values; source:
https://github.com/huggingface/safetensors (README, "Format").
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
    FROM_MINDSPORE,
    FROM_SAFETENSORS,
    ITEM_SIZE,
    StoredTensor,
    mindspore_name,
    open_for_reading,
    safetensors_code,
    stored_bytes,
)

# --- .ckpt ---

SLICE_BYTES = 512 << 20  # content of one value; MindSpore slices at the same size
_CRC_TAIL = 17  # b"crc_num" and ten bytes
_LENGTH_DELIMITED, _VARINT = 2, 0
_NAMES_MAX = 1 << 16  # bytes of a tag or type; more means that the file is not a checkpoint


def ckpt_frame(name: str, shape: tuple[int, ...], dtype: str) -> list[tuple[bytes, int]]:
    """The protobuf framing of one tensor: for each slice the bytes before its content, and the content's length."""
    total = stored_bytes(shape, dtype)
    tag = _field(1, name.encode("utf-8"))
    dims = shape or (0,)  # how MindSpore writes a scalar
    kind = b"".join(b"\x08" + _varint(size) for size in dims) + _field(2, mindspore_name(dtype).encode("ascii"))
    slices = []
    for start in range(0, max(total, 1), SLICE_BYTES):
        length = min(SLICE_BYTES, total - start)
        before = kind + b"\x1a" + _varint(length)
        tensor_head = b"\x12" + _varint(len(before) + length)
        value_length = len(tag) + len(tensor_head) + len(before) + length
        slices.append((b"\x0a" + _varint(value_length) + tag + tensor_head + before, length))
    return slices


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number, payload):
    return bytes([number << 3 | _LENGTH_DELIMITED]) + _varint(len(payload)) + payload


def read_ckpt(path: Path) -> list[StoredTensor]:
    """Lists the tensors of a .ckpt in file order, without their values; dtypes other than a weight's keep MindSpore's
    name ("Int32").

    Raises:
        InputError: not a MindSpore checkpoint, encrypted, or truncated.
    """
    size = os.stat(path).st_size
    with open_for_reading(path) as handle:
        cursor = _Cursor(handle, path, _content_end(handle, size))
        found = {}
        while cursor.position < cursor.end:
            _read_value(cursor, found)
    tensors = []
    for name, (shape, dtype, segments) in found.items():
        tensor = StoredTensor(name, shape, dtype, path, tuple(segments))
        if dtype in ITEM_SIZE and tensor.nbytes != sum(length for _, length in segments):
            raise InputError(
                f"{path}: key {name!r}: shape {shape} of {dtype} needs {tensor.nbytes} bytes, the file "
                f"holds {sum(length for _, length in segments)}; it is corrupt"
            )
        tensors.append(tensor)
    return tensors


def _content_end(handle, size):
    if size >= _CRC_TAIL:
        handle.seek(size - _CRC_TAIL)
        if handle.read(7) == b"crc_num":
            return size - _CRC_TAIL
    return size


class _Cursor:
    """Walks protobuf fields by seeking; holds only the small ones."""

    def __init__(self, handle, path, end):
        self.handle, self.path, self.end, self.position = handle, path, end, 0
        self._window, self._window_at = b"", 0

    def take(self, count):
        """Returns `count` bytes and moves on."""
        at = self.position - self._window_at
        if not 0 <= at <= len(self._window) - count:
            self.handle.seek(self.position)
            self._window, self._window_at, at = self.handle.read(max(count, 1024)), self.position, 0
        if at + count > len(self._window) or self.position + count > self.end:
            raise self.corrupt("it ends in the middle of an entry")
        self.position += count
        return self._window[at : at + count]

    def varint(self):
        """Reads one base-128 number."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
            shift += 7
            if shift > 63:
                raise self.corrupt("a length is not a number")

    def field(self, end):
        """Reads a field's key and length; returns (number, wire type, value or length)."""
        key = self.varint()
        number, wire = key >> 3, key & 7
        if wire not in (_VARINT, _LENGTH_DELIMITED):
            raise self.corrupt(f"unknown field type {wire}")
        value = self.varint()
        if wire == _LENGTH_DELIMITED and self.position + value > end:
            raise self.corrupt(f"an entry needs {self.position + value} bytes, {end} are there")
        return number, wire, value

    def text(self, length):
        """Reads a short string."""
        if length > _NAMES_MAX:
            raise self.corrupt(f"a name of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt("a name is not text") from error

    def corrupt(self, why):
        """The error for a broken file."""
        return InputError(
            f"{self.path}: not a MindSpore checkpoint, or cut off or encrypted: at byte {self.position} "
            f"of {self.end} {why}"
        )


def _read_value(cursor, found):
    number, wire, length = cursor.field(cursor.end)
    if (number, wire) != (1, _LENGTH_DELIMITED):
        raise cursor.corrupt(f"field {number} stands where a parameter is expected")
    end, name, tensor = cursor.position + length, None, None
    while cursor.position < end:
        number, wire, length = cursor.field(end)
        if (number, wire) == (1, _LENGTH_DELIMITED):
            name = cursor.text(length)
        elif (number, wire) == (2, _LENGTH_DELIMITED):
            tensor = _read_tensor(cursor, cursor.position + length)
        elif wire == _LENGTH_DELIMITED:
            cursor.position += length  # a map parameter: no weight of this model
    if name is None or cursor.position != end:
        raise cursor.corrupt("a parameter without a name")
    if tensor is None:
        return
    shape, dtype, segment = tensor
    if name not in found:
        found[name] = (shape, dtype, [segment])
    elif found[name][:2] != (shape, dtype):
        raise InputError(f"{cursor.path}: key {name!r} stands twice, as {found[name][:2]} and as {(shape, dtype)}")
    else:
        found[name][2].append(segment)


def _read_tensor(cursor, end):
    shape, dtype, segment = [], None, None
    while cursor.position < end:
        number, wire, value = cursor.field(end)
        if (number, wire) == (1, _VARINT):
            shape.append(value)
        elif (number, wire) == (2, _LENGTH_DELIMITED):
            dtype = cursor.text(value)
        elif (number, wire) == (3, _LENGTH_DELIMITED):
            segment = (cursor.position, value)
            cursor.position += value
        else:
            raise cursor.corrupt(f"field {number} in a tensor")
    if dtype is None or segment is None or cursor.position != end:
        raise cursor.corrupt("an incomplete tensor")
    # A dims of [0] is how MindSpore writes a scalar or a string.
    return tuple(shape) if shape != [0] else (), FROM_MINDSPORE.get(dtype, dtype), segment


# --- safetensors ---

_MAX_HEADER = 100_000_000  # bytes; the library's own limit
_OTHER_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def read_safetensors(path: Path) -> list[StoredTensor]:
    """Lists the tensors of a file in the order of their data; dtypes other than a weight's keep the format's own name
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


def safetensors_header(
    entries: Iterable[tuple[str, tuple[int, ...], str]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The bytes before the values, padded to a multiple of 8, and each tensor's offset in the file.

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

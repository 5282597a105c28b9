"""MindSpore's .ckpt format, read and written a part at a time.

A .ckpt is a protobuf `Checkpoint` (schema: mindspore/ccsrc/utils/checkpoint.proto): field 1, repeated, a `Value` of
tag (1) and tensor (2); the tensor of dims (1), tensor_type (2) and tensor_content (3). Large tensors are several
consecutive values of one tag, each with the full dims and a slice of the content. `mindspore.save_checkpoint` holds
all tensors in memory; here the framing is written by hand, so that the content can be streamed to known offsets.
With crc_check the file ends in `crc_num` and ten bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.tensors import (
    FROM_MINDSPORE,
    ITEM_SIZE,
    StoredTensor,
    mindspore_name,
    open_for_reading,
    stored_bytes,
)

SLICE_BYTES = 512 << 20  # content of one value; MindSpore cuts at the same size
_CRC_TAIL = 17  # b"crc_num" and ten bytes
_LENGTH_DELIMITED, _VARINT = 2, 0
_NAMES_MAX = 1 << 16  # bytes of a tag or type; more means that the file is not a checkpoint


def frame(name: str, shape: tuple[int, ...], dtype: str) -> list[tuple[bytes, int]]:
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
    """Lists the tensors of a .ckpt in file order, without their values; dtypes that are no weight's keep MindSpore's
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

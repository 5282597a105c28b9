"""Tensors of checkpoint files: their dtypes, casts between these, and values read without the rest of the file.

bfloat16 has no NumPy dtype: its values travel as uint16 bit patterns (the upper half of a float32).
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mindformers_glm32k.errors import InputError

# our name: (bytes, safetensors, MindSpore checkpoint, torch storage class, Hugging Face config.json, NumPy carrier)
_TABLE = {
    "fp32": (4, "F32", "Float32", "FloatStorage", "float32", np.dtype("<f4")),
    "fp16": (2, "F16", "Float16", "HalfStorage", "float16", np.dtype("<f2")),
    "bf16": (2, "BF16", "BFloat16", "BFloat16Storage", "bfloat16", np.dtype("<u2")),
}
DTYPES = tuple(_TABLE)
ITEM_SIZE = {name: row[0] for name, row in _TABLE.items()}
TO_SAFETENSORS = {name: row[1] for name, row in _TABLE.items()}
TO_MINDSPORE = {name: row[2] for name, row in _TABLE.items()}
TO_CONFIG = {name: row[4] for name, row in _TABLE.items()}
CARRIER = {name: row[5] for name, row in _TABLE.items()}
FROM_SAFETENSORS = {row[1]: name for name, row in _TABLE.items()}
FROM_MINDSPORE = {row[2]: name for name, row in _TABLE.items()}
FROM_TORCH_STORAGE = {row[3]: name for name, row in _TABLE.items()}
# dtypes of a training checkpoint's counters (steps, epochs, overflow): MindSpore's name -> (bytes, safetensors code).
_COUNTERS = {
    "Float64": (8, "F64"),
    "Int64": (8, "I64"),
    "UInt64": (8, "U64"),
    "Int32": (4, "I32"),
    "UInt32": (4, "U32"),
    "Int16": (2, "I16"),
    "UInt16": (2, "U16"),
    "Int8": (1, "I8"),
    "UInt8": (1, "U8"),
    "Bool": (1, "BOOL"),
}
_FROM_SAFETENSORS_COUNTER = {code: name for name, (_, code) in _COUNTERS.items()}
_EXPONENT = {"fp32": np.uint32(0x7F800000), "fp16": np.uint16(0x7C00), "bf16": np.uint16(0x7F80)}
CHUNK_BYTES = 2 << 20  # of values read at a time; with the results of a cast they fit a core's cache


def mindspore_name(dtype: str) -> str:
    """MindSpore's name of any dtype that a checkpoint file may hold, given as in "fp16", "Int64" or "I64".

    Raises:
        KeyError: any other dtype, such as a string's.
    """
    name = _FROM_SAFETENSORS_COUNTER.get(dtype, dtype)
    return TO_MINDSPORE.get(name) or (_COUNTERS[name] and name)


def safetensors_code(dtype: str) -> str:
    """The safetensors code of any dtype that a checkpoint file may hold; see `mindspore_name`."""
    return TO_SAFETENSORS.get(dtype) or _COUNTERS[mindspore_name(dtype)][1]


def item_size(dtype: str) -> int:
    """Bytes of one value of any dtype that a checkpoint file may hold; see `mindspore_name`."""
    return ITEM_SIZE.get(dtype) or _COUNTERS[mindspore_name(dtype)][0]


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of the values of a tensor, of any dtype that a checkpoint file may hold."""
    return prod(shape) * item_size(dtype)


def check_dtype(name: str) -> str:
    """Returns `name` if it is one of DTYPES; raises InputError otherwise."""
    if name not in _TABLE:
        raise InputError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return name


def cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Casts an array between the carriers of two DTYPES, rounding to nearest even; `values` itself if they agree."""
    if source == target:
        return values
    if source == "fp32":
        return _to_bf16(values) if target == "bf16" else _narrow(values)
    return _table(source, target)[values.view("<u2")]


@functools.cache
def _table(source, target):
    """All 65536 values of a 16-bit dtype, cast: looking up is faster than any arithmetic NumPy has for it."""
    bits = np.arange(1 << 16, dtype="<u2")
    wide = (bits.astype("<u4") << np.uint32(16)).view("<f4") if source == "bf16" else bits.view("<f2").astype("<f4")
    return {"fp32": lambda: wide, "fp16": lambda: _narrow(wide), "bf16": lambda: _to_bf16(wide)}[target]()


def _narrow(wide):
    with np.errstate(over="ignore"):  # overflow is counted by count_overflow, where the tensor's name is known
        return wide.astype("<f2")


def _to_bf16(wide):
    bits = wide.view("<u4")
    # Adding 0x7fff plus the lowest kept bit rounds the dropped half to nearest even.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype("<u2")
    nan = np.isnan(wide)
    if nan.any():  # rounding could carry a NaN's mantissa into the exponent: keep it a quiet NaN
        rounded[nan] = (bits[nan] >> np.uint32(16)).astype("<u2") | np.uint16(0x40)
    return rounded


def count_overflow(before: np.ndarray, after: np.ndarray, source: str, target: str) -> int:
    """Number of finite values that a cast turned into infinity."""
    if source == target or target == "fp32" or source == "fp16":
        return 0  # these targets hold every finite value of the source
    infinite = _is_infinite(after, target)
    return int(np.count_nonzero(infinite & ~_is_infinite(before, source))) if infinite.any() else 0


def count_not_finite(values: np.ndarray, dtype: str) -> int:
    """Number of values that are NaN or infinite: those with all bits of the exponent set."""
    exponent = _EXPONENT[dtype]
    exponents = values.view(exponent.dtype) & exponent
    return 0 if not exponents.size or exponents.max() < exponent else int(np.count_nonzero(exponents == exponent))


def _is_infinite(values, dtype):
    if dtype == "bf16":
        return (values & np.uint16(0x7FFF)) == np.uint16(0x7F80)
    return np.isinf(values)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have equal shapes, dtypes and bits, also those of NaNs; slices are not copied."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = np.dtype(f"u{one.dtype.itemsize}")
    return np.array_equal(one.view(bits), other.view(bits))


class TensorSpec(NamedTuple):
    """A tensor to write: its name, shape and dtype, one of DTYPES or a counter's."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file.

    Args:
        dtype: one of DTYPES, or the file format's own name of a dtype that is not a weight's.
        segments: (offset, bytes) in the file; together, in order, the little-endian values.
        strides: elements per step of each axis for tensors that are not stored in row-major order (torch views);
            `segments` is then the one range from the first to the last value.
        crc32: the file's own checksum of exactly these bytes, None where it has none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    segments: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] | None = None
    crc32: int | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.shape, self.dtype)

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yields the (offset, bytes) in the file that hold bytes [start, stop) of the values."""
        position = 0
        for offset, nbytes in self.segments:
            low, high = max(start, position), min(stop, position + nbytes)
            if low < high:
                yield offset + low - position, high - low
            position += nbytes

    def chunks(self, chunk_bytes: int = CHUNK_BYTES, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields the bytes [start, stop) of the values in order, as flat arrays of the carrier dtype.

        The arrays share one buffer: each is valid until the next is asked for.

        Args:
            chunk_bytes: the most bytes to hold at a time (tensors with strides: at least one row).
            start, stop: multiples of the item size; the whole tensor by default.

        Raises:
            InputError: the file ends early or cannot be read.
        """
        stop = self.nbytes if stop is None else stop
        read = self._raw_chunks if self.strides is None else self._strided_chunks
        for values in read(chunk_bytes, start, stop):
            yield values.view(CARRIER[self.dtype])

    def _raw_chunks(self, chunk_bytes, start, stop):
        chunk_bytes = max(chunk_bytes - chunk_bytes % 8, 8)
        buffer = np.empty(min(chunk_bytes, stop - start), np.uint8)
        with open_for_reading(self.file) as handle:
            for low in range(start, stop, chunk_bytes):
                chunk, filled = buffer[: min(chunk_bytes, stop - low)], 0
                for offset, nbytes in self.ranges(low, low + chunk.size):
                    _read_exactly(handle, offset, memoryview(chunk)[filled : filled + nbytes], self)
                    filled += nbytes
                yield chunk

    def _strided_chunks(self, chunk_bytes, start, stop):
        item = ITEM_SIZE[self.dtype]
        offset, nbytes = self.segments[0]
        flat = np.memmap(self.file, np.uint8, "r", offset, (nbytes,)).view(CARRIER[self.dtype])
        view = np.lib.stride_tricks.as_strided(
            flat, self.shape, [step * item for step in self.strides], writeable=False
        )
        row = prod(self.shape[1:]) * item
        rows = max(1, chunk_bytes // max(row, 1))
        for low in range(start // row, stop // row, rows):
            yield np.ascontiguousarray(view[low : min(low + rows, stop // row)]).reshape(-1)

    def load(self) -> np.ndarray:
        """The whole tensor as an array of the carrier dtype (bf16: uint16 bit patterns)."""
        flat = np.empty(prod(self.shape), CARRIER[self.dtype])
        filled = 0
        for values in self.chunks(1 << 20):
            flat[filled : filled + values.size] = values
            filled += values.size
        return flat.reshape(self.shape)

    def raw_bytes(self) -> bytes:
        """The bytes of a small entry of any dtype, such as a counter."""
        return b"".join(chunk.tobytes() for chunk in self._raw_chunks(CHUNK_BYTES, 0, self._held_bytes()))

    def checksum(self, on_read: Callable[[int], None] = lambda nbytes: None) -> int:
        """CRC-32 of the bytes as they lie in the file, of any dtype; `on_read` gets the size of each read."""
        found = 0
        for chunk in self._raw_chunks(CHUNK_BYTES, 0, self._held_bytes()):
            found = zlib.crc32(chunk, found)
            on_read(chunk.nbytes)
        return found

    def _held_bytes(self):
        return sum(nbytes for _, nbytes in self.segments)


def open_for_reading(path: Path) -> IO[bytes]:
    """Opens a file for reading bytes, unbuffered; raises InputError naming it."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _read_exactly(handle, offset, buffer, tensor):
    """Fills `buffer` from `offset`; raises InputError naming the tensor's file and key when the file ends early."""
    filled = 0
    while filled < len(buffer):
        try:
            count = os.preadv(handle.fileno(), [buffer[filled:]], offset + filled)
        except OSError as error:
            raise InputError(f"{tensor.file}: key {tensor.name!r}: cannot be read ({error.strerror})") from error
        if count == 0:
            raise InputError(
                f"{tensor.file}: key {tensor.name!r}: the file ends at byte {offset + filled}, "
                f"{offset + len(buffer)} are needed; download it again"
            )
        filled += count

"""A tensor where it lies in a file: name, shape, dtype and byte ranges, read without loading the rest."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.dtypes import CARRIER, ITEM_SIZE


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file.

    Args:
        name: as the file spells it.
        shape: rows first.
        dtype: "fp32", "fp16", "bf16", or another format's name of a dtype that is not a weight's.
        file: where it lies.
        segments: (offset, bytes) in the file; together, in order, the little-endian values.
        strides: elements per step of each axis for tensors that are not stored row after row (torch views);
            `segments` is then the one range from the first to the last value.
        crc32: the file's own checksum of exactly these bytes, None where it has none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    segments: tuple[tuple[int, int], ...]
    strides: Optional[tuple[int, ...]] = None
    crc32: Optional[int] = None

    @property
    def nbytes(self):
        """int: bytes of the values."""
        return element_count(self.shape) * ITEM_SIZE[self.dtype]

    def ranges(self, start, stop):
        """Yields the (offset, bytes) in the file that hold bytes [start, stop) of the values."""
        position = 0
        for offset, nbytes in self.segments:
            low, high = max(start, position), min(stop, position + nbytes)
            if low < high:
                yield offset + low - position, high - low
            position += nbytes

    def chunks(self, chunk_bytes, start=0, stop=None):
        """Yields the bytes [start, stop) of the values in order, as flat arrays of the carrier dtype.

        The arrays share one buffer: each is valid until the next is asked for.

        Args:
            chunk_bytes (int): the most bytes to hold at a time (tensors with strides: at least one row).
            start, stop (int): multiples of the item size; the whole tensor by default.

        Raises:
            InputError: the file ends early or cannot be read.
        """
        stop = self.nbytes if stop is None else stop
        if self.strides is not None:
            yield from self._strided_chunks(chunk_bytes, start, stop)
            return
        chunk_bytes = max(chunk_bytes - chunk_bytes % 8, 8)
        buffer = np.empty(min(chunk_bytes, stop - start), np.uint8)
        with open_for_reading(self.file) as handle:
            for low in range(start, stop, chunk_bytes):
                chunk, filled = buffer[: min(chunk_bytes, stop - low)], 0
                for offset, nbytes in self.ranges(low, low + chunk.size):
                    read_exactly(handle, offset, memoryview(chunk)[filled : filled + nbytes], self)
                    filled += nbytes
                yield chunk.view(CARRIER[self.dtype])

    def _strided_chunks(self, chunk_bytes, start, stop):
        item = ITEM_SIZE[self.dtype]
        offset, nbytes = self.segments[0]
        flat = np.memmap(self.file, np.uint8, "r", offset, (nbytes,)).view(CARRIER[self.dtype])
        view = np.lib.stride_tricks.as_strided(
            flat, self.shape, [step * item for step in self.strides], writeable=False
        )
        row = element_count(self.shape[1:]) * item
        rows = max(1, chunk_bytes // max(row, 1))
        for low in range(start // row, stop // row, rows):
            yield np.ascontiguousarray(view[low : min(low + rows, stop // row)]).reshape(-1)

    def load(self):
        """Returns the whole tensor as an array of the carrier dtype (bf16: uint16 bit patterns)."""
        flat = np.empty(element_count(self.shape), CARRIER[self.dtype])
        filled = 0
        for values in self.chunks(1 << 20):
            flat[filled : filled + values.size] = values
            filled += values.size
        return flat.reshape(self.shape)


def same_bits(one, other):
    """Whether two arrays have equal shapes, dtypes and bits: NaNs too, and no copy of a slice is made."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = np.dtype(f"u{one.dtype.itemsize}")
    return np.array_equal(one.view(bits), other.view(bits))


def element_count(shape):
    """Number of values of a shape, as a Python int (no overflow)."""
    count = 1
    for size in shape:
        count *= size
    return count


def open_for_reading(path):
    """Opens a file for reading bytes, unbuffered; raises InputError naming it."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_exactly(handle, offset, buffer, tensor):
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

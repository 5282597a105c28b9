"""Writes a checkpoint file one tensor after the other, and vouches for what lies there afterwards."""

import hashlib
import zlib

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import flush
from mindformers_glm32k.weights.checkpoint import read_file
from mindformers_glm32k.weights.dtypes import mindspore_name
from mindformers_glm32k.weights.formats.ckpt import frame
from mindformers_glm32k.weights.formats.safetensors import build_header

_CHUNK_BYTES = 2 << 20


class CheckpointWriter:
    """A file whose tensors are known and come in order.

    Args:
        path (pathlib.Path): `.ckpt`, or `.safetensors`.
        entries (list[tuple[str, tuple[int, ...], str]]): name, shape, dtype.
    """

    def __init__(self, path, entries):
        self.path, self.entries = path, list(entries)
        self.digests = {}  # name -> [SHA-256, CRC-32] of the little-endian values
        self._next = 0
        self._framed = path.suffix != ".safetensors"
        self._handle = open(path, "wb")
        if not self._framed:
            self._handle.write(build_header(self.entries, {"format": "ms"})[0])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self._handle.close()

    def write(self, name, values):
        """Appends the next tensor.

        Args:
            name (str): which must be the next of the entries.
            values (numpy.ndarray | bytes): in the entry's dtype; bytes for a counter.
        """
        expected, shape, dtype = self.entries[self._next]
        if name != expected:
            raise ValueError(f"{name} comes where {expected} is due")
        data = memoryview(values if isinstance(values, bytes) else np.ascontiguousarray(values).reshape(-1)).cast("B")
        position = 0
        for before, length in frame(name, shape, dtype):
            self._handle.write(before if self._framed else b"")
            self._handle.write(data[position : position + length])
            position += length
        if position != len(data):
            raise ValueError(f"{name}: {len(data)} bytes come where {position} are due")
        self.digests[name] = [hashlib.sha256(data).hexdigest(), zlib.crc32(data)]
        self._next += 1

    def finish(self):
        """Closes the file and reads it back.

        Raises:
            InputError: it reads back differently from what was written.
        """
        if self._next != len(self.entries):
            raise ValueError(f"{self.entries[self._next][0]} was not written")
        self._handle.close()
        flush(self.path)
        found = {tensor.name: tensor for tensor in read_file(self.path)}
        for name, shape, dtype in self.entries:
            tensor = found.pop(name, None)
            if (
                tensor is None
                or (tensor.shape, mindspore_name(tensor.dtype)) != (shape, mindspore_name(dtype))
                or checksum(tensor) != self.digests[name][1]
            ):
                raise InputError(
                    f"{self.path.name}: key {name!r} reads back differently from what was written (faulty "
                    "disk or memory, or the file was touched); try again"
                )

    def describe(self):
        """dict[str, dict]: for a report: shape, dtype and checksums of each tensor."""
        return {
            name: {
                "shape": list(shape),
                "dtype": dtype,
                "sha256": self.digests[name][0],
                "crc32": f"{self.digests[name][1]:08x}",
            }
            for name, shape, dtype in self.entries
        }


def checksum(tensor):
    """CRC-32 of the values of a StoredTensor of any dtype."""
    found = 0
    with open(tensor.file, "rb", buffering=0) as handle:
        for offset, nbytes in tensor.segments:
            handle.seek(offset)
            while nbytes:
                chunk = handle.read(min(nbytes, _CHUNK_BYTES))
                if not chunk:
                    return None
                found, nbytes = zlib.crc32(chunk, found), nbytes - len(chunk)
    return found

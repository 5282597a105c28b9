"""The one way to write checkpoints: every byte's offset known before the start, every tensor read back before the end.

Files are made in a work folder (see files.work_folder) and move to their final names when all of them are verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, flush
from mindformers_glm32k.weights.checkpoint import TensorGroup, read_file
from mindformers_glm32k.weights.formats import ckpt_frame, safetensors_header
from mindformers_glm32k.weights.tensors import (
    ITEM_SIZE,
    StoredTensor,
    TensorSpec,
    cast,
    count_not_finite,
    count_overflow,
    mindspore_name,
    stored_bytes,
)

FORMATS = ("ckpt", "safetensors")
_FLUSH_SECONDS = 0.25
_PAGE = 4096  # bytes, of memory and of file systems
_UNITS = {"": 1, "B": 1}  # KB, MB, … by thousands, KIB, MIB, … by 1024
_UNITS.update(
    {
        f"{letter}{kind}": base**power
        for kind, base in (("B", 10**3), ("IB", 2**10))
        for power, letter in enumerate("KMGT", 1)
    }
)


@dataclass(frozen=True)
class OutputFile:
    """One file to write.

    Args:
        name: its final name, without folder.
        size: bytes.
        framing: (offset, bytes) of everything that is not tensor values.
        segments: by tensor, the (offset, bytes) that take its values in order.
    """

    name: str
    size: int
    framing: tuple[tuple[int, bytes], ...]
    segments: dict[TensorSpec, tuple[tuple[int, int], ...]]


def parse_size(text: str | int | None) -> int | None:
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


def lay_out(
    tensors: Iterable[TensorSpec], name: str, max_shard_size: int | None = None, framework: str = "ms"
) -> list[OutputFile]:
    """Distributes tensors over files, in order, and gives every byte its offset.

    Args:
        tensors: what to write.
        name: of a single file, its suffix gives the format; shards are called STEM-00001-of-0000N.SUFFIX.
        max_shard_size: bytes of tensor values in one file, unless a single tensor is larger.
        framework: for the safetensors header, "ms" or "pt".
    """
    shards, filled = [[]], 0
    for tensor in tensors:
        if max_shard_size is not None and shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    stem, suffix = os.path.splitext(name)
    names = [f"{stem}-{index:05d}-of-{len(shards):05d}{suffix}" for index in range(1, len(shards) + 1)]
    lay_out_file = _lay_out_safetensors if suffix == ".safetensors" else _lay_out_ckpt
    return [lay_out_file(file, shard, framework) for file, shard in zip(names if len(shards) > 1 else [name], shards)]


def _lay_out_ckpt(name, tensors, _):
    position, framing, segments = 0, [], {}
    for tensor in tensors:
        ranges = []
        for before, length in ckpt_frame(*tensor):
            framing.append((position, before))
            ranges.append((position + len(before), length))
            position += len(before) + length
        segments[tensor] = tuple(ranges)
    return OutputFile(name, position, tuple(framing), segments)


def _lay_out_safetensors(name, tensors, framework):
    header, offsets = safetensors_header(tensors, {"format": framework})
    segments = {tensor: ((offset, tensor.nbytes),) for tensor, offset in zip(tensors, offsets)}
    return OutputFile(name, len(header) + sum(tensor.nbytes for tensor in tensors), ((0, header),), segments)


def index_text(files: Sequence[OutputFile]) -> str | None:
    """The index of a sharded checkpoint in Hugging Face's layout; None for a single file, which needs none."""
    if len(files) == 1:
        return None
    weight_map = {tensor.name: file.name for file in files for tensor in file.segments}
    total = sum(tensor.nbytes for file in files for tensor in file.segments)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


class CheckpointWriter:
    """Writes the values of tensors to files in a folder: those of one tensor in order, different tensors in any thread.

    Args:
        folder: an existing one; files of the same names are overwritten.
        files: as laid out.
    """

    def __init__(self, folder: Path, files: Sequence[OutputFile]) -> None:
        self.folder, self.files = folder, files
        self.digests: dict[str, tuple[str, int]] = {}  # name -> SHA-256, CRC-32 of the little-endian values
        self.zeros: dict[StoredTensor, int] = {}  # sources with zeros where a trained weight has none -> bytes of them
        self.not_finite: dict[StoredTensor, int] = {}  # sources with NaN or infinity -> how many values
        self._open, self._handles = {}, []
        self._flusher, self._flushes = ThreadPoolExecutor(1), []
        for file in files:
            handle = open(folder / file.name, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
            self._handles.append(handle)
            os.truncate(handle.fileno(), file.size)
            for offset, framing in file.framing:
                _write_exactly(handle.fileno(), memoryview(framing), offset)
            for tensor, segments in file.segments.items():
                output = StoredTensor(*tensor, folder / file.name, segments)
                self._open[tensor.name] = [output, handle.fileno(), hashlib.sha256(), 0, 0]

    @classmethod
    def for_file(
        cls, path: Path, tensors: Iterable[tuple[str, tuple[int, ...], str]], framework: str = "ms"
    ) -> CheckpointWriter:
        """A writer of one `.ckpt` or `.safetensors` file, from (name, shape, dtype)."""
        return cls(path.parent, lay_out([TensorSpec(*tensor) for tensor in tensors], path.name, None, framework))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_) -> None:
        self._flusher.shutdown()
        for handle in self._handles:
            handle.close()

    def write(self, name: str, values: np.ndarray | bytes, running_crc: int | None = None) -> None:
        """Adds to a tensor's values.

        Args:
            name: of the tensor.
            values: in its dtype's carrier; the bytes of a counter.
            running_crc: CRC-32 of all its values so far, where the caller has computed it.
        """
        output, handle, digest, crc, position = self._open[name]
        data = memoryview(values if isinstance(values, bytes) else np.ascontiguousarray(values).reshape(-1)).cast("B")
        digest.update(data)
        written, end = 0, position + len(data)
        for offset, nbytes in output.ranges(position, end):
            _write_exactly(handle, data[written : written + nbytes], offset)
            written += nbytes
        if written != len(data):
            raise ValueError(f"{name}: more than its {stored_bytes(output.shape, output.dtype)} bytes")
        self._open[name][3:] = [zlib.crc32(data, crc) if running_crc is None else running_crc, end]

    def flush_until(self, written: threading.Event) -> None:
        """Flushes the files every _FLUSH_SECONDS, in a thread of its own, until `written` is set: the system would
        leave most of the data to the last flush."""

        def run():
            while not written.wait(_FLUSH_SECONDS):
                self._flush()

        self._flushes.append(self._flusher.submit(run))

    def _flush(self):
        for file in self.files:
            flush(self.folder / file.name)

    def finish(self, workers: int = 1, progress: bool = False) -> None:
        """Reads every file back with the readers of any checkpoint and compares shapes, dtypes and checksums.

        Raises:
            InputError: a tensor reads back differently from what was written.
        """
        for name, (output, _, digest, crc, position) in self._open.items():
            if position != stored_bytes(output.shape, output.dtype):
                raise ValueError(f"{name}: {position} bytes were written")
            self.digests[name] = digest.hexdigest(), crc
        self._flushes.append(self._flusher.submit(self._flush))  # the disk is busy while the processor compares
        self._verify(workers, progress)
        for flushed in self._flushes:
            flushed.result()

    def _verify(self, workers, progress):
        tensors = [tensor for file in self.files for tensor in read_file(self.folder / file.name)]
        if sorted(tensor.name for tensor in tensors) != sorted(self._open):
            raise InputError(f"{self.folder}: the files do not list the tensors that were written; try another disk")
        total = sum(tensor.nbytes for file in self.files for tensor in file.segments)
        bar = _Bar("verify", total, progress)

        def check(tensor):
            expected = self._open[tensor.name][0]
            if (tensor.shape, mindspore_name(tensor.dtype)) != (
                expected.shape,
                mindspore_name(expected.dtype),
            ) or tensor.checksum(bar.update) != self.digests[tensor.name][1]:
                raise InputError(
                    f"{tensor.file.name}: key {tensor.name!r} reads back differently from what was written (faulty "
                    "disk or memory, or the file was touched); try again"
                )

        with bar:
            _in_parallel(check, tensors, workers)

    def describe(self) -> dict[str, dict[str, Any]]:
        """For a report: shape, dtype and checksums of each tensor."""
        return {
            tensor.name: {
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "sha256": self.digests[tensor.name][0],
                "crc32": f"{self.digests[tensor.name][1]:08x}",
            }
            for file in self.files
            for tensor in file.segments
        }


def write_groups(
    writer: CheckpointWriter, groups: Sequence[TensorGroup], workers: int, progress: bool, check_crc: bool
) -> None:
    """Streams source values through casts into their targets; reading, casting, hashing and writing all run outside
    Python's lock.

    Raises:
        InputError: a corrupt source, or values that the dtype cannot hold.
    """
    bar = _Bar("convert", sum(target.nbytes for group in groups for target in group.targets), progress)
    written = threading.Event()
    writer.flush_until(written)
    with bar:
        try:
            _in_parallel(lambda group: _write_group(writer, group, bar.update, check_crc), groups, workers)
        finally:
            written.set()


def _write_group(writer, group, on_written, check_crc):
    sums = {source: 0 for source in group.sources if source.crc32 is not None and check_crc}
    for move in group.moves:
        source, target = move.source, move.target
        copied = source in sums and len(group.moves) == 1 and source.dtype == target.dtype
        start, stop = (count * ITEM_SIZE[source.dtype] for count in (move.source_start, move.source_start + move.count))
        for values in source.chunks(start=start, stop=stop):
            zeros = _zero_bytes(source, values)
            if zeros:
                writer.zeros[source] = writer.zeros.get(source, 0) + zeros
            wrong = count_not_finite(values, source.dtype)
            if wrong:
                writer.not_finite[source] = writer.not_finite.get(source, 0) + wrong
            if source in sums:
                sums[source] = zlib.crc32(values, sums[source])
            result = cast(values, source.dtype, target.dtype)
            lost = count_overflow(values, result, source.dtype, target.dtype)
            if lost:
                raise InputError(
                    f"{source.file}: key {source.name!r}: {lost} values are too large for {target.dtype}; "
                    "choose bf16 or fp32"
                )
            writer.write(target.name, result, sums[source] if copied else None)
            on_written(result.nbytes)
    for source, found in sums.items():
        if found != source.crc32:
            raise InputError(
                f"{source.file}: key {source.name!r} is corrupt: the file's checksum (CRC-32) of it "
                f"is {source.crc32:08x}, its bytes give {found:08x}; download it again"
            )


def _zero_bytes(tensor, values):
    """Bytes of whole pages of zeros in `values`, as a hole in a half-downloaded file has; of small tensors all or none.

    Not counted: biases, and zeros of a vocabulary unless all of `values` are: rows of unused tokens may be zero.
    """
    if tensor.name.endswith("bias"):
        return 0
    data = values.view(np.uint8)
    count = data.size // _PAGE
    if count < 2 or "embed" in tensor.name or tensor.shape[:1] >= (1 << 14,):
        return 0 if data.any() else data.size
    pages = data[: count * _PAGE].view(np.uint64).reshape(count, -1)
    suspects = np.flatnonzero(pages[:, 0] == 0)
    return sum(_PAGE for page in suspects if not pages[page].any())


def publish(folder: Path, destination: Path, names: Iterable[str], texts: Mapping[str, str]) -> None:
    """Moves verified files from a work folder to their final names, then the small text files, such as the index."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    destination.mkdir(parents=True, exist_ok=True)
    for name in [*names, *texts]:
        os.replace(folder / name, destination / name)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON; readers never see half of it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class _Bar(tqdm):
    """Progress in bytes, from any thread."""

    def __init__(self, title, total, shown):
        super().__init__(total=total, unit="B", unit_scale=True, desc=title, disable=not shown)
        self._updating = threading.Lock()

    def update(self, n=1):
        with self._updating:
            super().update(n)


def _in_parallel(function: Callable[[Any], None], items: Sequence[Any], workers: int) -> None:
    """Calls a function on all items in threads; when one fails, those that have not begun are left out."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception()]
            if failed:
                raise failed[0].exception()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _write_exactly(handle, view, offset):
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count

"""Byte offsets of the lines of a big file, kept on disk: random access without reading the file.

The index is one int64 array in NumPy's own format, memory-mapped, so that the index of a 10 GB file takes only the
memory of the pages in use. It holds n, the number of lines that are not empty; their n starts and the end of the last
one; the numbers (from 1, ascending) of empty lines; CRC-32 of all these. The file's name has the data file's size and
modification time, so that an index of an earlier state is never used.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file

CACHE_FOLDER = ".glm32k_cache"
_BLOCK = 1 << 20  # bytes read at a time, into a buffer that stays in the CPU cache
_STORED_FROM = 64 << 20  # bytes of data; a smaller file is indexed anew in a few hundredths of a second
_PROGRESS_FROM = 1 << 30  # bytes
_NEWLINE = 10
_WHITESPACE = np.zeros(256, bool)
_WHITESPACE[list(b" \t\r\n\v\f")] = True


class LineIndex:
    """Starts of the lines of one file, empty ones left out.

    A line ends at a line feed or at the end of the file; a carriage return before the line feed and a byte order mark
    belong to the line. Lines of white space alone are empty.

    Args:
        path: the data file.
        cache_dir: see `cache_folder`.
        stored_from: files from this size (bytes) on have their index on disk, smaller ones in memory.

    Attributes:
        path: the data file.
        stored: the index's file, or None.
        blank: int64, numbers (from 1) of the empty lines before the last line with text.

    Raises:
        InputError: no such file, an empty one, or one with empty lines only.
    """

    def __init__(
        self, path: str | os.PathLike, cache_dir: str | os.PathLike | None = None, stored_from: int = _STORED_FROM
    ):
        self.path = Path(require_file(path, "data file", "Give a file with one JSON object per line."))
        state = os.stat(self.path)
        self.stored = None
        if state.st_size < stored_from:
            numbers = _index(self.path, state.st_size)
        else:
            folder, name = cache_folder(self.path, cache_dir), cache_name(self.path)
            self.stored = folder / f"{name}-{state.st_size}-{state.st_mtime_ns}.lines.npy"
            numbers = _load(self.stored)
            if numbers is None:
                numbers = self._store(folder.glob(f"{glob.escape(name)}-*.lines.npy"), state.st_size)
        self._starts, self.blank = _starts(numbers), np.array(numbers[numbers[0] + 2 : -1])
        if not len(self):
            raise InputError(
                f"data file {self.path}: there are only empty lines in it; give a file with one JSON object per line"
            )
        self.blank = self.blank[self.blank < self.line(len(self) - 1)]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Offsets in bytes of the starts of line `index` (0 <= index < len(self)) and of the next one."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        return int(self._starts[index]), int(self._starts[index + 1])

    def line(self, index: int) -> int:
        """The number, from 1, that line `index` has in the file, empty lines counted."""
        number = index + 1
        for blank in self.blank:  # ascending, and few
            if blank > number:
                break
            number += 1
        return int(number)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Bytes (int64) of the lines `indices`."""
        indices = np.asarray(indices)
        return self._starts[indices + 1] - self._starts[indices]

    def _store(self, outdated, size):
        """Writes the index and maps it."""
        for old in outdated:  # of an earlier state of the data file
            old.unlink(missing_ok=True)
        with atomic_path(self.stored) as temporary:
            np.save(temporary, _index(self.path, size))
        numbers = _load(self.stored)
        if numbers is None:
            raise InputError(
                f"{self.stored}: is damaged, although it has just been written; is the disk full "
                "or is the data file being changed?"
            )
        return numbers

    def __getstate__(self):
        # a memory map is opened again in another process, not sent to it
        return {name: value for name, value in vars(self).items() if not (self.stored and name == "_starts")}

    def __setstate__(self, state):
        vars(self).update(state)
        if self.stored:
            numbers = _load(self.stored)
            if numbers is None:
                raise InputError(f"{self.stored}: is gone or damaged; start again")
            self._starts = _starts(numbers)


def _index(path, size):
    """The array that the module's docstring describes."""
    starts, blank = [], []
    with tqdm(
        total=size, unit="B", unit_scale=True, desc=f"index of {path.name}", disable=size < _PROGRESS_FROM
    ) as progress:
        for some_starts, some_blank in _scan(path, size, progress):
            starts.append(some_starts)
            blank.append(some_blank)
    numbers = np.concatenate([[sum(map(len, starts)) - 1], *starts, *blank, [0]]).astype(np.int64, copy=False)
    numbers[-1] = zlib.crc32(numbers[:-1])
    return numbers


def _starts(numbers):
    return numbers[1 : numbers[0] + 2]


def _load(path):
    """The stored array, memory-mapped; None where it is missing or damaged."""
    try:
        numbers = np.load(path, mmap_mode="r")
        whole = path.stat().st_size == numbers.offset + numbers.nbytes
    except (OSError, ValueError, EOFError, SyntaxError):  # SyntaxError: a damaged header
        return None
    if not whole or numbers.ndim != 1 or numbers.dtype != np.int64 or len(numbers) < 3:
        return None
    return numbers if zlib.crc32(numbers[:-1]) == numbers[-1] else None


def _scan(path, size, progress):
    """Yields (starts, numbers of empty lines), int64 both, block by block; finally the end of the last line."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(min(_BLOCK, size))
        line, start, end = 1, 0, 0  # number and start of the current line; end of the last line with text
        open_blank = True  # whether the current line has been white space so far
        position = 0
        while position < size:
            read = file.readinto(memoryview(buffer)[: size - position])
            if not read:
                break  # the file has shrunk: the next run finds another size and indexes it again
            block, newlines = np.frombuffer(buffer, np.uint8, read), _newlines(buffer, read)
            # the lines that begin in this block; only those with white space first (rare in JSON lines) are read whole
            first = np.concatenate(([0], newlines + 1))
            last = np.concatenate((newlines, [len(block)]))
            empty = first == last
            inside = np.flatnonzero(~empty)
            empty[inside] = _WHITESPACE[block[first[inside]]]
            for at in np.flatnonzero(empty):
                empty[at] = _WHITESPACE[block[first[at] : last[at]]].all()
            empty[0] &= open_blank
            begins = first + position
            begins[0] = start
            done, numbers = slice(0, len(newlines)), np.arange(line, line + len(newlines))
            blank = empty[done]
            yield begins[done][~blank], numbers[blank]
            if not blank.all():
                end = position + int(last[done][~blank][-1]) + 1
            line, start, open_blank = line + len(newlines), int(begins[-1]), bool(empty[-1])
            position += len(block)
            progress.update(len(block))
        if start < position and not open_blank:
            yield np.array([start], np.int64), np.zeros(0, np.int64)
            end = position
        yield np.array([end], np.int64), np.zeros(0, np.int64)


def _newlines(buffer, size):
    """Offsets (int64) of the line feeds in the first `size` bytes of a bytearray."""
    looked_at = min(size, 1 << 14)
    if buffer.count(b"\n", 0, looked_at) * 500 > looked_at:
        return np.flatnonzero(np.frombuffer(buffer, np.uint8, size) == _NEWLINE)
    found, at = [], buffer.find(b"\n", 0, size)  # long lines: a search by memchr, five times as fast
    while at >= 0:
        found.append(at)
        at = buffer.find(b"\n", at + 1, size)
    return np.array(found, np.int64)


def cache_folder(data_file: str | os.PathLike, configured: str | os.PathLike | None = None) -> Path:
    """The folder for files derived from a data file, created if missing.

    By default `.glm32k_cache` beside the file where that is writable, else `temporary/glm32k_cache` in MindFormers'
    output folder (LOCAL_DEFAULT_PATH, ./output when unset). Data files with the same name do not collide in it: see
    `cache_name`.
    """
    beside = Path(data_file).resolve().parent
    if configured:
        folder = Path(configured)
    elif os.access(beside / CACHE_FOLDER if (beside / CACHE_FOLDER).is_dir() else beside, os.W_OK):
        folder = beside / CACHE_FOLDER
    else:
        folder = Path(os.environ.get("LOCAL_DEFAULT_PATH") or "output") / "temporary" / "glm32k_cache"
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == CACHE_FOLDER and not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")  # the cache stays out of the user's commits
    return folder


def cache_name(data_file: str | os.PathLike, *parts: str) -> str:
    """The file's name and ten hex digits, a hash of its path and of `parts`, on which the content depends as well."""
    path = Path(data_file).resolve()
    digest = hashlib.sha256("\0".join((str(path), *parts)).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{path.name}-{digest[:10]}"

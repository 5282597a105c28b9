"""Where the lines of a big file begin, kept on disk: random access without reading the file.

An index file is a header and the starts of all lines that are not empty, as int64, with the end of the last one
behind them; it is memory-mapped, so the offsets of a 10 GB file cost no more memory than the pages that are looked at.

    bytes 0-7    magic and version        24-31  lines that are not empty, n
    bytes 8-15   size of the data file    32-39  CRC-32 of all that follows
    bytes 16-23  its mtime, nanoseconds   40-47  empty lines that stand before a line, m
    then         n + 1 starts; m numbers of empty lines (from 1, ascending), int64 all of them
"""

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file

_MAGIC = b"GLM32KX1"
_HEADER = struct.Struct("<8sqqqqq")
_BLOCK = 1 << 20  # bytes read at a time, into memory that stays in the processor's cache
_STORED_FROM = 64 << 20  # bytes of data; a smaller file is indexed anew in a few hundredths of a second
_PROGRESS_FROM = 1 << 30
_NEWLINE = 10
_WHITESPACE = np.zeros(256, bool)
_WHITESPACE[list(b" \t\r\n\v\f")] = True


class LineIndex:
    """Starts of the lines of one file, empty ones left out.

    A line is what ends in a line feed or with the file; a carriage return before the line feed belongs to it, and so
    does a byte order mark. Lines of white space alone are empty.

    Args:
        path (str | os.PathLike): the data file.
        cache_dir (str | os.PathLike | None): see `cache_folder`.
        stored_from (int): files from this size (bytes) on have their index on disk; smaller ones in memory.

    Attributes:
        blank (np.ndarray): int64, numbers (from 1) of the empty lines that stand before the last line with text.

    Raises:
        InputError: no such file, an empty one, or one with empty lines only.
    """

    def __init__(self, path, cache_dir=None, stored_from=_STORED_FROM):
        self.path = Path(require_file(path, "data file", "Give a file with one JSON object per line."))
        state = os.stat(self.path)
        self._identity = (state.st_size, state.st_mtime_ns)
        if state.st_size < stored_from:
            starts, blank = [], []
            for some_starts, some_blank in _scan(self.path, state.st_size):
                starts.append(some_starts)
                blank.append(some_blank)
            self._starts, self.blank = np.concatenate(starts), np.concatenate(blank)
        else:
            self.stored = cache_folder(self.path, cache_dir) / (cache_name(self.path) + ".lines")
            if self._load() is not None:
                self._store()
                problem = self._load()
                if problem:
                    raise InputError(
                        f"{self.stored}: {problem}, although it has just been written; is the disk full "
                        "or is the data file being changed?"
                    )
        self.blank = self.blank[self.blank < (self.line(len(self) - 1) if len(self) else 0)]
        if not len(self):
            raise InputError(
                f"data file {self.path}: there are only empty lines in it; give a file with one JSON object per line"
            )

    def __len__(self):
        return len(self._starts) - 1

    def __getitem__(self, index):
        """tuple[int, int]: where line `index` (0 <= index < len(self)) starts and where the next one does, in bytes."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        return int(self._starts[index]), int(self._starts[index + 1])

    def line(self, index):
        """int: the number, from 1, that line `index` has in the file, empty lines counted."""
        number = index + 1
        for blank in self.blank:  # ascending, and few
            if blank > number:
                break
            number += 1
        return int(number)

    def sizes(self, indices):
        """np.ndarray: int64 bytes of the lines `indices` (int array)."""
        indices = np.asarray(indices)
        return self._starts[indices + 1] - self._starts[indices]

    def __getstate__(self):
        # memory maps are opened again in another process, not sent to it
        state = dict(vars(self))
        if isinstance(self._starts, np.memmap):
            del state["_starts"]
        return state

    def __setstate__(self, state):
        vars(self).update(state)
        if "_starts" not in state:
            blank = self.blank
            problem = self._load()
            if problem:
                raise InputError(f"{self.stored}: {problem}; start again")
            self.blank = blank

    def _load(self):
        """Maps the stored index; str, what is wrong with it, or None."""
        try:
            with open(self.stored, "rb") as file:
                header = file.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    return "is cut off"
                magic, size, mtime, lines, crc, blank = _HEADER.unpack(header)
                if magic != _MAGIC or (size, mtime) != self._identity:
                    return "belongs to another state of the data file"
                if lines < 0 or blank < 0 or os.fstat(file.fileno()).st_size != _HEADER.size + 8 * (lines + 1 + blank):
                    return "is cut off"
                if _crc(file) != crc:
                    return "is damaged"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        numbers = np.memmap(self.stored, np.int64, "r", _HEADER.size, (lines + 1 + blank,))
        self._starts, self.blank = numbers[: lines + 1], np.array(numbers[lines + 1 :])
        return None

    def _store(self):
        size = self._identity[0]
        with (
            atomic_path(self.stored) as temporary,
            open(temporary, "wb+") as file,
            tqdm(
                total=size, unit="B", unit_scale=True, desc=f"index of {self.path.name}", disable=size < _PROGRESS_FROM
            ) as progress,
        ):
            file.write(bytes(_HEADER.size))
            lines, blank = -1, []
            for starts, some_blank in _scan(self.path, size, progress):
                lines += len(starts)
                file.write(starts.tobytes())
                blank.append(some_blank)
            blank = np.concatenate(blank)
            file.write(blank.tobytes())
            file.seek(_HEADER.size)
            crc = _crc(file)
            file.seek(0)
            file.write(_HEADER.pack(_MAGIC, *self._identity, lines, crc, len(blank)))


def _scan(path, size, progress=None):
    """Yields (starts, numbers of empty lines), int64 both, block by block; at last the end of the last line."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(min(_BLOCK, size))
        line, start, end = 1, 0, 0  # number and start of the line that is being read; end of the last one with text
        open_blank = True  # whether only white space of it has been seen
        position = 0
        while position < size:
            read = file.readinto(memoryview(buffer)[: size - position])
            if not read:
                break  # the file has become shorter: what is there is indexed, and stale by its size the next time
            block, newlines = np.frombuffer(buffer, np.uint8, read), _newlines(buffer, read)
            # the lines that begin in this block, and whether their first byte is white space (rare in JSON lines)
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
            if progress is not None:
                progress.update(len(block))
        if start < position and not open_blank:
            yield np.array([start], np.int64), np.zeros(0, np.int64)
            end = position
        yield np.array([end], np.int64), np.zeros(0, np.int64)


def _newlines(buffer, size):
    """int64 places of the line feeds in the first `size` bytes of a bytearray."""
    looked_at = min(size, 1 << 14)
    if buffer.count(b"\n", 0, looked_at) * 500 > looked_at:
        return np.flatnonzero(np.frombuffer(buffer, np.uint8, size) == _NEWLINE)
    found, at = [], buffer.find(b"\n", 0, size)  # long lines: a search by memchr, five times as fast
    while at >= 0:
        found.append(at)
        at = buffer.find(b"\n", at + 1, size)
    return np.array(found, np.int64)


def _crc(file):
    crc = 0
    while True:
        block = file.read(1 << 20)
        if not block:
            return crc
        crc = zlib.crc32(block, crc)


NAME = ".glm32k_cache"


def cache_folder(data_file, configured=None):
    """The folder for what is derived from a data file; it is made when it is not there.

    Args:
        data_file (str | os.PathLike): the data file.
        configured (str | os.PathLike | None): the user's choice. By default `.glm32k_cache` beside the file where
            that can be written, else `temporary/glm32k_cache` in MindFormers' output folder (LOCAL_DEFAULT_PATH,
            ./output when unset).

    Returns:
        pathlib.Path: the folder. Files of data files with the same name do not collide in it: see `cache_name`.
    """
    beside = Path(data_file).resolve().parent
    if configured:
        folder = Path(configured)
    elif os.access(beside / NAME if (beside / NAME).is_dir() else beside, os.W_OK):
        folder = beside / NAME
    else:
        folder = Path(os.environ.get("LOCAL_DEFAULT_PATH") or "output") / "temporary" / "glm32k_cache"
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == NAME and not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")  # nothing to commit beside the user's data
    return folder


def cache_name(data_file, *parts):
    """A name that stands for a data file and whatever else its content depends on.

    Args:
        data_file (str | os.PathLike): the data file.
        *parts (str): what else.

    Returns:
        str: the file's name and ten hex digits of a digest of its path and the parts.
    """
    path = Path(data_file).resolve()
    digest = hashlib.sha256("\0".join((str(path), *parts)).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{path.name}-{digest[:10]}"

"""JSON-lines files: random access to checked records through an index of the lines."""

from __future__ import annotations

import codecs
import os
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from mindformers_glm32k.checks import UnusableJSON, choice, parse_json
from mindformers_glm32k.data.line_index import LineIndex
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import require_file

MAX_PROBLEMS = 5  # lines named in one message
MAX_LINE_BYTES = 64 << 20  # some 16 million tokens; a longer line is no record, and is not read into memory
CHECKED_BYTES = 16 << 20  # checked before a run starts, in 0.1 s; records beyond are checked when read
RAISE, SKIP = "raise", "skip"
ON_ERROR = (RAISE, SKIP)
_LOOKED_AT = 1000  # lines, to find out what a file holds where the first ones are damaged
_PROGRESS_FROM = 64 << 20  # bytes


class BrokenJSON(InputError):
    """A line that is not JSON."""


class JsonLines:
    """The records of one JSON-lines file by index.

    The constructor checks the lines of the first CHECKED_BYTES and the last one (a file that was cut off ends in a
    broken one), so that a small file is known to be sound before a training run starts; lines beyond are checked when
    they are read. With on_error "skip" the whole file is read and checked, so that the number of records is known. A
    LineIndex has the offsets of the lines; a record is read and parsed on access. Reading is safe from several threads
    and from forked or spawned processes.

    Args:
        path: the file, UTF-8, one JSON object per line. Empty lines at the end are ignored.
        check: called with each record; raises InputError, whose message does not name the location, when the record is
            not fit for use.
        cache_dir: where the index of a big file is kept; see `cache_folder`.
        on_error: what happens to damaged lines: "raise" an InputError, or "skip" them.
        shown: the file that `path` was converted from, for messages; each of its records is a line of `path`.
        keep_open: False where there are more files than a process may have open.

    Attributes:
        path: the file, or `shown` where that is given.
        unit: what `line` counts, "line" or "record".
        check: the constructor's argument.
        problems: the damaged lines that were skipped.

    Raises:
        InputError: no such file, an empty one, or one without a single sound line; with on_error "raise" also lines
            that are empty, broken, too long or refused by `check`, of which up to MAX_PROBLEMS are named.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        check: Callable[[dict], Any] | None = None,
        cache_dir: str | os.PathLike | None = None,
        on_error: str = RAISE,
        shown: Path | None = None,
        keep_open: bool = True,
    ):
        choice(on_error, "on_error", ON_ERROR)
        self._index = LineIndex(path, cache_dir)
        self.path, self.check = shown or self._index.path, check
        self.unit = "record" if shown else "line"
        self._keep_open = keep_open
        self._descriptor = None
        self._checked = 0  # number of records, from the first on, that are known to be sound
        self._kept = None  # int64, positions of the sound lines in the index, where some are skipped
        self.problems = Problems(self.path, self.unit)
        if on_error == SKIP:
            self._skip_damaged_lines()
        else:
            self._check_lines()

    def _check_lines(self):
        for line in self._index.blank[: MAX_PROBLEMS + 1]:
            self.problems.add(int(line), "empty line; remove it")
        last = len(self._index) - 1
        size = min(self._index[last][1], CHECKED_BYTES)
        with self._progress(size) as progress:
            record = 0
            while record <= last and self.problems.count <= MAX_PROBLEMS:
                start, stop = self._index[record]
                progress.update(stop - start)
                self._is_sound(record)
                if stop < CHECKED_BYTES:
                    record += 1
                    self._checked = record
                else:
                    record = last if record < last else last + 1
        if self.problems.count:
            raise InputError(self.problems.text(all_counted=False))

    def _skip_damaged_lines(self):
        kept = array("q")
        with self._progress(self._index[len(self._index) - 1][1]) as progress:
            for record in range(len(self._index)):
                start, stop = self._index[record]
                progress.update(stop - start)
                if self._is_sound(record):
                    kept.append(record)
        if not kept:
            raise InputError(f"{self.problems.text()}; no line is left")
        if self.problems.count:
            self._kept = np.frombuffer(kept, np.int64)
        self._checked = len(kept)

    def _progress(self, size):
        return tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {self.path}", disable=size < _PROGRESS_FROM)

    def _is_sound(self, record):
        """Whether line `record` of the index can be used; if not, adds it to the problems."""
        start, stop = self._index[record]
        raw = None if stop - start > MAX_LINE_BYTES else self._read(record)
        try:
            self._parse(raw, record)
            return True
        except InputError as error:
            cut_off = isinstance(error, BrokenJSON) and not raw.endswith(b"\n")
            self.problems.add(
                self._index.line(record),
                f"{error} (the last line, not closed: is the file cut off?)" if cut_off else error,
            )
            return False

    def __len__(self) -> int:
        return len(self._index) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> dict:
        """Reads one record; InputError for a line that is broken or refused by `check`, or a file that has changed
        since it was checked.
        """
        record = self._record(index)
        start, stop = self._index[record]
        raw = None if stop - start > MAX_LINE_BYTES else self._read(record)
        if index >= self._checked:
            try:
                return self._parse(raw, record)
            except InputError as error:
                raise InputError(f"{self.path}: {self.unit} {self.line(index)}: {error}") from error
        try:
            return parse_line(raw, first=start == 0)
        except InputError as error:
            raise InputError(
                f"{self.path}: the file has changed since it was checked ({error}); "
                "start again with a file that stays as it is"
            ) from error

    def _record(self, index):
        """The position in the line index of record `index`, 0 <= index < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        return int(index) if self._kept is None else int(self._kept[index])

    def _read(self, record):
        start, stop = self._index[record]
        if not self._keep_open:
            with open(self._index.path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), stop - start, start)
        if self._descriptor is None:
            self._descriptor = os.open(self._index.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        return os.pread(self._descriptor, stop - start, start)

    def _parse(self, raw, record):
        parsed = parse_line(raw, first=record == 0)
        if self.check is not None:
            try:
                self.check(parsed)
            except RecursionError as error:
                raise UnusableJSON("brackets nested too deeply") from error
        return parsed

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Bytes (int64) of the lines of the records `indices`."""
        return self._index.sizes(indices if self._kept is None else self._kept[np.asarray(indices)])

    def line(self, index: int) -> int:
        """The line number, from 1, of a record, empty lines counted."""
        return self._index.line(self._record(index))

    def __getstate__(self):
        return {**vars(self), "_descriptor": None}  # a descriptor means nothing in another process


def first_record(
    path: str | os.PathLike,
    check: Callable[[dict], Any] | None = None,
    on_error: str = RAISE,
    shown: Path | None = None,
) -> dict:
    """Reads only the first record, or the first sound one, to find out what a file holds.

    Args:
        path: the file.
        check: as for JsonLines.
        shown: as for JsonLines.
        on_error: "raise", or "skip" to go on where the first lines are damaged.

    Raises:
        InputError: no such file, an empty one, or a first line that is damaged (when skipping: all of the first 1000
            are).
    """
    path = require_file(path, "data file", "Give a file with one JSON object per line.")
    problems = Problems(shown or path, "record" if shown else "line")
    with open(path, "rb") as file:
        for number, raw in raw_lines(file):
            try:
                record = parse_line(raw, first=number == 1)
                if check is not None:
                    check(record)
                return record
            except InputError as error:
                problems.add(number, error)
            if on_error == RAISE or number == _LOOKED_AT:
                break
    raise InputError(problems.text())


class Problems:
    """The damaged lines of one file: `count`, and what is wrong with the first ones."""

    def __init__(self, path: Any, unit: str = "line"):
        self.path, self.unit, self.count, self._first = path, unit, 0, []

    def add(self, line: int, problem: Any) -> None:
        """Counts a line, by its number from 1; `problem` says what is wrong with it."""
        self.count += 1
        if len(self._first) < MAX_PROBLEMS:
            self._first.append((line, str(problem)))

    def text(self, all_counted: bool = True) -> str:
        """The lines named in one sentence; `all_counted` is False where the search ended before the file did."""
        more = self.count - len(self._first)
        named = "; ".join(f"{self.unit} {line}: {problem}" for line, problem in sorted(self._first))
        rest = f"; and {more} more" if all_counted else "; and more"
        return f"{self.path}: {named}" + (rest if more else "")


def raw_lines(file: BinaryIO, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """Reads a binary file line by line; skips lines longer than `limit` bytes without holding them in memory.

    Yields:
        the line's number from 1, and the line with its end; None for one that is too long.
    """
    number = 0
    while True:
        raw = file.readline(limit + 1)
        if not raw:
            return
        number += 1
        piece = raw
        if len(raw) > limit:
            raw = None
        while len(piece) and raw is None and not piece.endswith(b"\n"):
            piece = file.readline(1 << 20)
        yield number, raw


def parse_line(raw: bytes | None, first: bool = False) -> dict:
    """Parses one line.

    Args:
        raw: the line; None stands for one that is longer than MAX_LINE_BYTES.
        first: whether it is the file's first one, which may have a byte order mark.

    Raises:
        InputError: says what is wrong with the line, but not its location.
    """
    if raw is None:
        raise InputError(
            f"longer than {MAX_LINE_BYTES >> 20} MB, which no record is; does the file have line breaks "
            "between its records? Split or remove the line"
        )
    if not raw.strip():
        raise InputError("empty line; remove it")
    try:
        record = parse_json(raw.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise BrokenJSON(
            f"not UTF-8 at byte {error.start}; convert the file to UTF-8 (from GBK: iconv -f GB18030 -t UTF-8)"
        ) from error
    except UnusableJSON:
        raise
    except ValueError as error:
        plain = raw.strip().removeprefix(codecs.BOM_UTF8).rstrip(b",") if hasattr(raw, "removeprefix") else raw
        if plain != raw.strip():  # a BOM between joined files, or the comma of a line from a JSON array
            return parse_line(plain)
        raise BrokenJSON(f"broken JSON ({error}): {_shorten(raw)}; {_remedy(raw.strip())}") from error
    if not isinstance(record, dict):
        hint = (
            "the file is one JSON array; write one object per line"
            if isinstance(record, list)
            else 'a line looks like {"content": "…", "summary": "…"}'
        )
        raise InputError(f"a JSON object is needed, found {type(record).__name__} {_shorten(raw)}; {hint}")
    return record


def _remedy(raw):
    """What to do about a line that is not JSON."""
    if raw == b"[":
        return "the file is one JSON array over many lines; write one object per line"
    if not raw.strip(b"\0"):
        return "zero bytes, as a full disk or a crash leaves them: restore the file or remove the line"
    if raw == b"{" or raw.startswith(b"{") and raw.endswith((b",", b"{", b"[")):
        return "the object runs over several lines; write one object per line"
    if raw.startswith((b"{'", b'{"')) and b"': " in raw:
        return "a Python dict, not JSON; write it with json.dumps"
    if b"}{" in raw or b"} {" in raw:
        return "several objects in one line; write one object per line"
    return "mend or remove the line"


def _shorten(raw, limit=60):
    text = raw.decode("utf-8", errors="replace").strip()
    return text if len(text) <= limit else text[:limit] + "…"

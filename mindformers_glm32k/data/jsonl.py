"""JSON-lines files: every line checked once, then read at random through its offset."""
import json
import os
import weakref
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import require_file

MAX_PROBLEMS = 5  # lines named in one message
_PROGRESS_FROM = 64 << 20  # bytes; smaller files are checked in less than a second


class JsonLines:
    """The records of one JSON-lines file by number.

    The constructor reads the file once and checks every line, so that a broken one is named before a training
    run starts and not when the run gets there. Kept in memory are 8 bytes a line; a record is read and parsed
    when it is asked for. Reading is safe from several threads and from forked or spawned processes.

    Args:
        path (str | os.PathLike): the file, UTF-8, one JSON object per line. Empty lines at the end are ignored.
        check (Callable[[dict], object] | None): called with each record; raises InputError, whose message does
            not name the place, when the record is not fit for use.

    Raises:
        InputError: no such file, an empty one, or lines that are empty, broken or refused by `check`; up to
            MAX_PROBLEMS lines are named.
    """

    def __init__(self, path, check=None):
        self.path = Path(require_file(path, "data file", "Give a file with one JSON object per line."))
        self._offsets = self._scan(check)
        self._descriptor = None

    def _scan(self, check):
        starts, end, blank, problems = array("q"), 0, [], []
        size = self.path.stat().st_size
        with open(self.path, "rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {self.path}",
                                                 disable=size < _PROGRESS_FROM) as progress:
            position = 0
            for number, raw in enumerate(file, 1):
                start, position = position, position + len(raw)
                progress.update(len(raw))
                if not raw.strip():
                    blank.append(number)
                    continue
                problems += [f"line {line}: empty line; remove it" for line in blank]
                blank = []
                try:
                    record = _parse(raw, first=number == 1)
                    if check is not None:
                        check(record)
                except InputError as error:
                    cut_off = "" if raw.endswith(b"\n") else " (the last line, not closed: is the file cut off?)"
                    problems.append(f"line {number}: {error}{cut_off}")
                if len(problems) > MAX_PROBLEMS:
                    break
                starts.append(start)
                end = position
        if problems:
            more = "; and more" if len(problems) > MAX_PROBLEMS else ""
            raise InputError(f"{self.path}: " + "; ".join(problems[:MAX_PROBLEMS]) + more)
        if not starts:
            raise InputError(f"data file {self.path}: there are only empty lines in it; "
                             "give a file with one JSON object per line")
        starts.append(end)
        return np.frombuffer(starts, np.int64)

    def __len__(self):
        return len(self._offsets) - 1

    def __getitem__(self, index):
        """Reads one record.

        Args:
            index (int): 0 <= index < len(self).

        Returns:
            dict

        Raises:
            InputError: the file has changed since it was checked.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        try:
            return _parse(os.pread(self._descriptor, stop - start, start), first=index == 0)
        except InputError as error:
            raise InputError(f"{self.path}: the file has changed since it was checked ({error}); "
                             "start again with a file that stays as it is") from error

    def line(self, index):
        """int: the line number, from 1, of record `index` (empty lines are only allowed after the last one)."""
        return index + 1

    def __getstate__(self):
        return {**vars(self), "_descriptor": None}  # a descriptor means nothing in another process


def first_record(path):
    """Reads the first line alone, to find out what a file holds.

    Args:
        path (str | os.PathLike)

    Returns:
        dict

    Raises:
        InputError: no such file, an empty one, or a first line that is no JSON object.
    """
    path = require_file(path, "data file", "Give a file with one JSON object per line.")
    with open(path, "rb") as file:
        raw = file.readline()
    try:
        return _parse(raw, first=True)
    except InputError as error:
        raise InputError(f"{path}: line 1: {error}") from error


def _parse(raw, first=False):
    if not raw.strip():
        raise InputError("empty line; remove it")
    try:
        record = json.loads(raw.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    except RecursionError as error:
        raise InputError("brackets nested too deeply for a record") from error
    except ValueError as error:
        if first and raw.strip() == b"[":
            raise InputError("the file is one JSON array over many lines; write one object per line") from error
        raise InputError(f"broken JSON ({error}): {_shorten(raw)}; mend or remove the line") from error
    if not isinstance(record, dict):
        hint = "the file is one JSON array; write one object per line" if isinstance(record, list) else \
            'a line looks like {"content": "…", "summary": "…"}'
        raise InputError(f"a JSON object is needed, found {type(record).__name__} {_shorten(raw)}; {hint}")
    return record


def _shorten(raw, limit=60):
    text = raw.decode("utf-8", errors="replace").strip()
    return text if len(text) <= limit else text[:limit] + "…"

"""JSON-lines files: records read at random through the index of their lines, and checked."""
import json
import os
import weakref

from tqdm import tqdm

from mindformers_glm32k.data.index import LineIndex
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import require_file

MAX_PROBLEMS = 5  # lines named in one message
CHECKED_BYTES = 128 << 20  # checked before a run starts, in less than a second; what follows, when it is read
_PROGRESS_FROM = 64 << 20  # bytes


class JsonLines:
    """The records of one JSON-lines file by number.

    The constructor checks the lines of the first CHECKED_BYTES and the last one (a file that was cut off ends in a
    broken one), so that a small file is known to be sound before a training run starts; a line behind that is checked
    when it is read. Where the lines are is in a LineIndex; a record is read and parsed when it is asked for. Reading
    is safe from several threads and from forked or spawned processes.

    Args:
        path (str | os.PathLike): the file, UTF-8, one JSON object per line. Empty lines at the end are ignored.
        check (Callable[[dict], object] | None): called with each record; raises InputError, whose message does
            not name the place, when the record is not fit for use.
        cache_dir (str | os.PathLike | None): where the index of a big file is kept; see `cache_folder`.

    Raises:
        InputError: no such file, an empty one, or lines that are empty, broken or refused by `check`; up to
            MAX_PROBLEMS lines are named.
    """

    def __init__(self, path, check=None, cache_dir=None):
        self._index = LineIndex(path, cache_dir)
        self.path, self._check = self._index.path, check
        self._descriptor = None
        self._checked = 0  # so many records, from the first on, have been found sound
        self._check_lines()

    def _check_lines(self):
        problems = [(int(line), "empty line; remove it") for line in self._index.blank[:MAX_PROBLEMS + 1]]
        last = len(self._index) - 1
        size = min(self._index[last][1], CHECKED_BYTES)
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {self.path}",
                  disable=size < _PROGRESS_FROM) as progress:
            record = 0
            while record <= last:
                start, stop = self._index[record]
                raw = self._read(record)
                progress.update(stop - start)
                try:
                    self._parse(raw, record)
                except InputError as error:
                    cut_off = "" if raw.endswith(b"\n") else " (the last line, not closed: is the file cut off?)"
                    problems.append((self.line(record), f"{error}{cut_off}"))
                if len(problems) > MAX_PROBLEMS:
                    break
                if stop < CHECKED_BYTES:
                    record += 1
                    self._checked = record
                else:
                    record = last if record < last else last + 1
        if problems:
            problems.sort()
            more = "; and more" if len(problems) > MAX_PROBLEMS else ""
            raise InputError(f"{self.path}: " + "; ".join(f"line {line}: {problem}" for line, problem
                                                          in problems[:MAX_PROBLEMS]) + more)

    def __len__(self):
        return len(self._index)

    def __getitem__(self, index):
        """Reads one record.

        Args:
            index (int): 0 <= index < len(self).

        Returns:
            dict

        Raises:
            InputError: a line that is broken or refused by `check`, or a file that has changed since it was checked.
        """
        raw = self._read(index)
        if index >= self._checked:
            try:
                return self._parse(raw, index)
            except InputError as error:
                raise InputError(f"{self.path}: line {self.line(index)}: {error}") from error
        try:
            return _parse(raw, first=index == 0)
        except InputError as error:
            raise InputError(f"{self.path}: the file has changed since it was checked ({error}); "
                             "start again with a file that stays as it is") from error

    def _read(self, index):
        start, stop = self._index[index]
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        return os.pread(self._descriptor, stop - start, start)

    def _parse(self, raw, index):
        record = _parse(raw, first=index == 0)
        if self._check is not None:
            self._check(record)
        return record

    def sizes(self, indices):
        """np.ndarray: int64 bytes of the lines of the records `indices` (int array)."""
        return self._index.sizes(indices)

    def line(self, index):
        """int: the line number, from 1, of record `index`, empty lines counted."""
        return self._index.line(index)

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

"""Files of predictions, DATASET.jsonl: read whole, and appended to so that a kill at any moment costs one answer."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mindformers_glm32k.data.jsonl import parse_line
from mindformers_glm32k.errors import InputError


def check_prediction(row: dict, what: str) -> None:
    """Raises InputError, which begins with `what`, where a row lacks what scores need."""
    wanted = {"pred": str, "answers": list, "all_classes": (list, type(None)), "length": int}
    for name, kind in wanted.items():
        if name not in row or not isinstance(row[name], kind) or isinstance(row[name], bool):
            found = f"is {type(row[name]).__name__}" if name in row else "is missing"
            raise InputError(f"{what}: field {name!r} {found}; predict writes pred, answers, all_classes and length")


def read_predictions(path: Path) -> tuple[list[dict], int, bool]:
    """Reads one file of predictions.

    Returns:
        The rows, how many lines repeat an `_id` (they are left out), and whether the last line is half a line.

    Raises:
        InputError: a line that is no prediction.
    """
    rows, ids, doubles = [], set(), 0
    lines = path.read_bytes().split(b"\n")
    rest = lines.pop()  # behind the last line break there is nothing, or half a line
    if rest and _is_whole(rest):  # a last line without its end, as other programs may write it
        lines.append(rest)
        rest = b""
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            row = parse_line(raw, first=number == 1)
        except InputError as error:
            raise InputError(f"{path}: line {number}: {error}") from error
        check_prediction(row, f"{path}: line {number}")
        key = row.get("_id")
        if key is not None and key in ids:
            doubles += 1
            continue
        ids.add(key)
        rows.append(row)
    return rows, doubles, bool(rest)


def _is_whole(raw):
    try:
        check_prediction(parse_line(raw), "")
    except InputError:
        return False
    return True


class PredictionFile:
    """One file that several processes may append to, each line once.

    Every write happens under a lock of the file, so that half a line at its end is always that of a process that was
    killed: it is cut off. Before a write the lines that others have added are read; a sample that is there is not
    written again.

    Args:
        path: the file; made when it is not there.
        stamp: what determines the predictions; lines with another one, or with none, are refused.

    Raises:
        InputError: a damaged line, or one with another stamp.
    """

    def __init__(self, path: Path, stamp: dict):
        self.path, self._stamp = path, stamp
        self._done: set[str] = set()
        self._read = 0  # bytes that are known
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            self._catch_up(file)

    def __contains__(self, key: str) -> bool:
        """Whether the sample with this key has its line, as far as read."""
        return key in self._done

    def __len__(self) -> int:
        return len(self._done)

    def add(self, key: str, row: dict) -> bool:
        """Appends a row, on disk when this returns; False where another process has written the sample meanwhile."""
        text = json.dumps({**row, "_id": key, "stamp": self._stamp}, ensure_ascii=False)
        line = text.encode("utf-8", "replace")  # half characters, which servers can send, become question marks
        with self._locked() as file:
            self._catch_up(file)
            if key in self._done:
                return False
            file.seek(0, os.SEEK_END)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._done.add(key)
            self._read = file.tell()
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator:
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process that holds it
            yield file

    def _catch_up(self, file):
        file.seek(self._read)
        new = file.read()
        whole = new.rfind(b"\n") + 1
        if whole < len(new):
            file.truncate(self._read + whole)
        for raw in new[:whole].split(b"\n"):
            if raw.strip():
                self._note(raw)
        self._read += whole

    def _note(self, raw):
        try:
            row = parse_line(raw)
            check_prediction(row, "a line")
        except InputError as error:
            raise InputError(f"{self.path}: {error}; move the file away to predict again") from error
        found = row.get("stamp")
        if found != self._stamp:
            raise InputError(
                f"{self.path}: has lines that were predicted otherwise ({_first_difference(found, self._stamp)}); "
                "give another --output_dir, or remove the file"
            )
        self._done.add(str(row["_id"]))


def _first_difference(found, wanted):
    if not isinstance(found, dict):
        return "without a stamp: not by `glm32k longbench predict`"
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            return f"{key} {found.get(key)!r}, now {wanted.get(key)!r}"
    return "another stamp"

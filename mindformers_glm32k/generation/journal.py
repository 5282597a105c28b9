"""Long runs of many answers: a file to which several processes append each line once, so that a kill at any moment
costs one answer; progress with an estimate of the time left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from mindformers_glm32k.data.jsonl import parse_line
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path


class Journal:
    """One file of JSON lines that several processes may append to, each line once.

    Every write holds a lock of the file, so that an incomplete line at its end is always of a killed process and is
    removed. Before a write, the lines that other processes have added are read; a key that is there is not written
    again.

    Args:
        path: the file; created with its folder if missing.
        key_of: the key of a line's record; raises InputError for one that does not belong here.

    Raises:
        InputError: a damaged line, or one that does not belong here.
    """

    def __init__(self, path: Path, key_of: Callable[[dict], str]):
        self.path, self._key_of = path, key_of
        self._done: set[str] = set()
        self._read = 0  # bytes read so far
        self._file: os.stat_result | None = None  # the file that they were read from
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            self._catch_up(file)

    def __contains__(self, key: str) -> bool:
        """Whether the line with this key is there, as far as read."""
        return key in self._done

    def __len__(self) -> int:
        return len(self._done)

    def add(self, key: str, row: dict) -> bool:
        """Appends a record, on disk when this returns; False where another process has written that key meanwhile."""
        text = json.dumps(row, ensure_ascii=False)
        line = text.encode("utf-8", "replace")  # lone surrogates, which servers can send, become question marks
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

    def put_in_order(self, keys: Sequence[str]) -> bool:
        """Rewrites the lines in the order of `keys` if all of them are there by now; else returns False."""
        with self._locked() as file:
            self._catch_up(file)
            if not self._done.issuperset(keys):
                return False
            file.seek(0)
            lines = {self._key_of(parse_line(raw)): raw for raw in file.read().split(b"\n") if raw.strip()}
            ordered = b"".join(lines[key] + b"\n" for key in keys)
            file.seek(0)
            if file.read() != ordered:
                with atomic_path(self.path) as temporary:
                    temporary.write_bytes(ordered)
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator:
        while True:
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process that holds it
                try:
                    stays = os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
                except FileNotFoundError:
                    stays = False
                if stays:  # not replaced by another process's put_in_order while this one waited for the lock
                    yield file
                    return

    def _catch_up(self, file):
        state = os.fstat(file.fileno())
        if self._file is None or not os.path.samestat(state, self._file):
            self._file, self._read = state, 0
        file.seek(self._read)
        new = file.read()
        whole = new.rfind(b"\n") + 1
        if whole < len(new):
            file.truncate(self._read + whole)
        for raw in new[:whole].split(b"\n"):
            if raw.strip():
                self._done.add(self._key(raw))
        self._read += whole

    def _key(self, raw):
        try:
            return self._key_of(parse_line(raw))
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error


def first_difference(found: object, wanted: dict) -> str:
    """Where two stamps differ, for messages."""
    if not isinstance(found, dict):
        return "without a stamp"
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            return f"{key} {found.get(key)!r}, now {wanted.get(key)!r}"
    return "another stamp"


class Progress:
    """Prints a run's progress and time left: on a terminal in one line that is rewritten, else every half minute.

    Args:
        done, total: answers that are there already, and all.
        noun: what is answered, in the plural.
        work: what is left to do, in any unit, where answers differ in cost; by default 1 per answer.
        stream: where to print; by default sys.stderr at the time of printing.
    """

    def __init__(
        self, done: int, total: int, noun: str = "samples", work: float | None = None, stream: TextIO | None = None
    ):
        self._before, self._done, self._total = done, done, total
        self._work, self._worked = total - done if work is None else work, 0.0
        self._noun, self._stream = noun, stream
        self._begun = self._said = time.monotonic()
        self._terminal = self._out().isatty()
        if done:
            print(f"{done} of {total} {noun} are there", file=self._out())

    def _out(self):
        return self._stream or sys.stderr

    def step(self, where: str = "", work: float = 1) -> None:
        """One answer is done; `where` is its data set."""
        self._done += 1
        self._worked += work
        now = time.monotonic()
        if now - self._said >= (0.5 if self._terminal else 30):
            self._said = now
            named = f", {where}" if where else ""
            text = f"{self._done} of {self._total} {self._noun}{named}: {self._rate(now)}"
            line = f"\r{text:<78}" if self._terminal else text
            print(line, end="" if self._terminal else "\n", file=self._out(), flush=True)

    def end(self) -> None:
        """The run is over."""
        seconds = time.monotonic() - self._begun
        print(
            f"{chr(13) if self._terminal else ''}{self._done - self._before} {self._noun} predicted in "
            f"{spoken_time(seconds)}",
            file=self._out(),
        )

    def _rate(self, now):
        seconds, done = now - self._begun, self._done - self._before
        left = seconds * max(0.0, self._work - self._worked) / self._worked
        return f"{seconds / done:.2f} s each, {spoken_time(left)} left"


def spoken_time(seconds: float) -> str:
    """A duration, such as "3 min 20 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

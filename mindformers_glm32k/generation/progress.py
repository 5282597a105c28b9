"""How far a run of many answers is, and when it will be done."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Says on stderr how far a run is and when it will be done: on a terminal in one line, else every half minute.

    Args:
        done, total: answers that are there, and all.
        noun: what they are answers to.
        work: what is to be done, in any unit, where one answer costs more than another; by default one each.
        stream: where to; stderr as it is at the time by default.
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
    """Such as "3 min 20 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

"""A terminal for answers alone: what MindFormers and the libraries below it print goes to a log file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def logs_to(path: str | os.PathLike) -> Iterator[tuple[TextIO, TextIO]]:
    """Sends all that any library of this process writes to stdout or stderr to the end of a file, for a while.

    Yields:
        the stdout and the stderr of before.
    """
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    # where Python's own stream is something else than the descriptor (a test's), it is left as it is
    kept = [_copy(stream, number) for number, stream in ((1, sys.stdout), (2, sys.stderr))]
    before = [os.dup(number) for number in (1, 2)]
    with open(path, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield kept[0], kept[1]
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):
                stream.flush()
        for number, descriptor in zip((1, 2), before):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for stream in kept:
            stream.flush()


def _copy(stream, number):
    stream.flush()
    try:
        if stream.fileno() != number:
            return stream
    except (AttributeError, OSError, ValueError):
        return stream
    return os.fdopen(os.dup(number), "w", encoding="utf-8", errors="replace", buffering=1)

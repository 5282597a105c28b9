"""What a command asks of its process before MindSpore is there: Ctrl-C, which MindSpore's own handler turns into
SIGTERM while it computes; and a terminal for answers alone, all that libraries print in a log file."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

INTERRUPT = {signal.SIGINT}


def pass_on_interrupts(unhandled: Callable[[], None] | None = None) -> bool:
    """From here on SIGINT reaches Python's handler, whatever the process computes; whether that could be arranged.

    The signal is blocked in every thread, and one thread waits for it. To be called before NumPy and MindSpore are
    imported: threads that are there already would still take it, so that with MindSpore there nothing is done.

    Args:
        unhandled: called, in that thread, behind a signal for which Python has its default handler only.
    """
    if threading.current_thread() is not threading.main_thread() or "mindspore" in sys.modules:
        return False
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPT)
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPT))

    def wait() -> None:
        while True:
            signal.sigwait(INTERRUPT)
            handled = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            _thread.interrupt_main()
            if unhandled and not handled:
                unhandled()

    threading.Thread(target=wait, daemon=True).start()
    return True


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

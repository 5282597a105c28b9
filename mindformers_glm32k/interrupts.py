"""Ctrl-C for programs in which MindSpore computes: a handler of its own turns SIGINT into SIGTERM meanwhile."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable

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

"""A command's process and machine: Ctrl-C, which MindSpore's own handler would turn into SIGTERM while it computes; a
terminal that shows answers only, with all output of libraries in a log file; and the memory that is left."""

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
    """Makes SIGINT reach Python's handler whatever the process computes; returns whether that was possible.

    The signal is blocked in every thread, and one thread waits for it. To be called before NumPy and MindSpore are
    imported, whose threads would still receive it; does nothing once MindSpore is imported.

    Args:
        unhandled: called in the waiting thread after a signal for which only Python's default handler is set.
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
    """While open, appends to a file all that the libraries of this process write to stdout or stderr.

    Yields:
        streams to the former stdout and stderr.
    """
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    # a Python stream that does not write to the descriptor (captured by a test) is yielded as it is
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


# folder below /sys/fs/cgroup -> file of the limit, file of the usage, field of memory.stat for reclaimable cache
_CGROUPS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(root: str | os.PathLike = "/") -> int | None:
    """Bytes that processes can still take before the system ends one of them: the lesser of what the kernel reports
    (MemAvailable and free swap) and what the limits of this process's control groups (container, batch job) leave.

    Source: Linux, Documentation/filesystems/proc.rst (meminfo), admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst.

    Args:
        root: folder that holds `proc` and `sys`.

    Returns:
        None where the system does not tell.
    """
    proc, groups = Path(root, "proc"), Path(root, "sys", "fs", "cgroup")
    found = _fields(proc / "meminfo")
    if "MemAvailable" not in found:
        return None
    free = [1024 * (found["MemAvailable"] + found.get("SwapFree", 0))]
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            folder, inside = "memory" if controllers else "", Path(path.lstrip("/"))
            free += [_left(groups / folder / group, *_CGROUPS[folder]) for group in (inside, *inside.parents)]
    return max(min(size for size in free if size is not None), 0)


def _left(group, limit, used, cached):
    """What a control group's limit leaves; None where it has none, or where its folder is not in sight."""
    try:
        most, now = (int((group / name).read_text(encoding="utf-8")) for name in (limit, used))
    except (OSError, ValueError):  # "max": no limit
        return None
    return most - now + _fields(group / "memory.stat").get(cached, 0)


def resident_memory(process: int) -> int | None:
    """Bytes of memory that a process holds; None where the system does not tell, or the process is gone."""
    size = _fields(Path(f"/proc/{process}/status")).get("VmRSS")
    return None if size is None else 1024 * size


def _fields(path):
    """name -> number, of lines such as "MemAvailable: 1024 kB" or "inactive_file 4096"."""
    found = {}
    for line in _lines(path):
        name, *rest = line.replace(":", " ").split() or [""]
        if rest and rest[0].isdigit():
            found[name] = int(rest[0])
    return found


def _lines(path):
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

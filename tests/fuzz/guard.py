"""What a reader may not do, whatever it reads: execute anything, write outside a folder, take much memory."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

SPARE_BYTES = 192 << 20  # beside ten times the file: tables, threads' arenas, blocks of at most 64 MiB
TIMES = 10
_STARTS = ("subprocess.Popen", "pty.spawn", "socket.connect", "pickle.find_class")
_STARTS += tuple(f"os.{name}" for name in "system exec posix_spawn spawn fork forkpty startfile".split())
_CODE = ("exec", "compile", "marshal.loads", "ctypes.dlopen")  # what an import does, too
_PATHS = {  # event -> how many of its first arguments are paths, and which argument is the first folder's descriptor
    **dict.fromkeys(("os.mkdir", "os.chmod"), (1, 2)),
    **dict.fromkeys(("os.remove", "os.rmdir"), (1, 1)),
    **dict.fromkeys(("os.rename", "os.link"), (2, 2)),
    **dict.fromkeys(("os.truncate", "os.chown", "shutil.rmtree"), (1, None)),
    **dict.fromkeys(("os.symlink", "shutil.move", "shutil.copyfile"), (2, None)),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watched: list[_Watch] = []


class _Watch:
    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self.found: list[str] = []

    def see(self, event, arguments):
        if event in _STARTS or (event in _CODE and not _is_pythons_own()):
            self.found.append(f"{event} {arguments!r}"[:300])
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & _WRITES:
                self._inside(event, path)
        elif event in _PATHS:
            count, descriptor = _PATHS[event]
            if descriptor is None or len(arguments) <= descriptor or arguments[descriptor] in (-1, None):
                for path in arguments[:count] if event != "os.symlink" else arguments[1:2]:
                    self._inside(event, path)

    def _inside(self, event, path):
        path = os.path.abspath(os.fsdecode(path))
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if real != self.folder and not real.startswith(self.folder + os.sep) and real != os.devnull:
            self.found.append(f"{event} {path}")


def _is_pythons_own():
    """Whether Python imports a module, or makes a class or a signature: no execution of what is read."""
    frame = sys._getframe(2)
    while frame:
        if frame.f_globals.get("__name__") in ("importlib._bootstrap", "collections", "dataclasses", "inspect"):
            return True
        frame = frame.f_back
    return False


def _hook(event, arguments):
    for watch in _watched:
        watch.see(event, arguments)


_hooked: list[bool] = []  # Python has no way to take a hook out again


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Yields a list that fills with what is executed, or written outside the folder, meanwhile."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    watch = _Watch(folder)
    _watched.append(watch)
    try:
        yield watch.found
    finally:
        _watched.remove(watch)


@contextlib.contextmanager
def memory_bound(nbytes: int) -> Iterator[None]:
    """Lets this process's address space grow by `nbytes` at most; more is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

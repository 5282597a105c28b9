"""Writing files so that an interrupted program never leaves half of one under its final name."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mindformers_glm32k.errors import InputError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` on success, removes it on any exception.

    The temporary name keeps the suffix of `path` (writers such as matplotlib choose the format by it). The folder is
    created when missing, and the data is flushed to disk before the rename.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def copy_atomically(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies a file so that `target` is never half written."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def require_file(path: str | os.PathLike | None, what: str, hint: str) -> Path:
    """Returns `path` as a Path if it is a file with something in it.

    Args:
        path: the file as the user gave it.
        what: what the file is, for the message ("vocabulary file").
        hint: what to do when it is not there.

    Raises:
        InputError: `path` is empty, missing, a folder, or an empty file.
    """
    if not path:
        raise InputError(f"{what}: no path given. {hint}")
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} {path}: is a folder, a file is needed. {hint}")
    if not path.is_file():
        raise InputError(f"{what} {path}: no such file. {hint}")
    if path.stat().st_size == 0:
        raise InputError(f"{what} {path}: the file is empty. {hint}")
    return path

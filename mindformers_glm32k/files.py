"""Files written so that an interrupted program never leaves half of one under its final name, and digests of files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mindformers_glm32k.errors import InputError

_WEIGHTS = (".ckpt", ".safetensors", ".bin")
_SPARE_BYTES = 16 << 20  # of disk, for reports, logs and the file system


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
    """Returns `path` as a Path if it is a non-empty file.

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
    try:
        path.lstat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # a name that is too long, a folder without permission
            raise InputError(f"{what} {path}: {error.strerror}. {hint}") from error
    except ValueError:  # a zero byte in the name: no such file
        pass
    if path.is_symlink() and not path.exists():
        raise InputError(f"{what} {path}: is a link to {os.readlink(path)}, which is not there. {hint}")
    if path.is_dir():
        raise InputError(f"{what} {path}: is a folder, a file is needed. {hint}")
    if not path.is_file():
        raise InputError(f"{what} {path}: no such file. {hint}")
    if path.stat().st_size == 0:
        raise InputError(f"{what} {path}: the file is empty. {hint}")
    return path


def can_be_written(folder: str | os.PathLike) -> bool:
    """Whether files can be created in a folder, or in its nearest existing parent before it exists; creates none."""
    path = Path(folder).absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


class Busy(InputError):
    """Another process works on the same output."""


def lock_file(path: str | os.PathLike) -> TextIO:
    """Creates and locks a file; the caller unlinks and closes it. Raises Busy when another process holds it."""
    while True:
        handle = open(path, "w", encoding="utf-8")  # noqa: SIM115, it stays open while the lock is held
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                return handle
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                handle.close()
                raise Busy(f"{path}: another process is writing this output") from error
            if not isinstance(error, FileNotFoundError):
                raise
        handle.close()  # its last holder removed it in between: lock the new one


@contextlib.contextmanager
def work_folder(output: Path, parent: Path | None = None) -> Iterator[Path]:
    """A hidden folder for an output, which is written and verified there before it gets its final name.

    The folder is empty on entry (leftovers of a killed program are removed) and is removed on exit.

    Args:
        output: the final name.
        parent: folder for the work folder, on the same disk as the output; by default the output's own parent.

    Raises:
        Busy: another process works on the same output.
        InputError: the disk is full, or the folder cannot be written.
    """
    folder = (parent or output.parent) / f".{output.name}.work"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder.with_name(folder.name + ".lock"))
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.unlink(lock.name)
            lock.close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{output}: the disk is full; free some space or choose another folder") from error
        raise InputError(f"{error.filename or output}: cannot be written ({error.strerror})") from error


def require_space(output: str | os.PathLike, nbytes: int, folder: Path | None = None) -> None:
    """Raises InputError unless a disk has `nbytes` and a small reserve free.

    Args:
        output: what will be written, for the message.
        nbytes: bytes needed.
        folder: any folder on that disk, existing or not; by default the parent of `output`.
    """
    existing = folder or Path(output).absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if nbytes + _SPARE_BYTES > free:
        raise InputError(
            f"{output}: {nbytes + _SPARE_BYTES:,} bytes are needed, {free:,} are free on that disk; free "
            "some space or choose another folder"
        )


def flush(path: str | os.PathLike) -> None:
    """Writes a file's data to the disk."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def weights_digest(path: Path) -> str:
    """SHA-256, as 64 hexadecimal digits, of a file, or of all weights in a folder together with their names.

    Raises:
        InputError: no weights are there.
    """
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.suffix in _WEIGHTS)
    if not files:
        raise InputError(f"{path}: no weights in it ({', '.join(_WEIGHTS)})")
    digest = hashlib.sha256()
    for file in files:
        if len(files) > 1:
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as opened:
            while chunk := opened.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def flush_folder(path: str | os.PathLike) -> None:
    """Flushes a folder's entries to the disk, without which a rename may not survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

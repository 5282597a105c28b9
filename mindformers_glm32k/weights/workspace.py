"""A hidden folder beside an output: everything is made there, and moved to its final name when it is verified."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.lock import lock_file

SPARE_BYTES = 16 << 20  # of disk: journals, reports, logs, file system


@contextlib.contextmanager
def workspace(output):
    """Opens the folder, empty; what a killed program left there is gone, and so is the folder afterwards.

    Args:
        output (pathlib.Path): the final name.

    Yields:
        pathlib.Path: the folder, on the same disk.

    Raises:
        lock.Busy: another process works on the same output.
        InputError: the disk is full, or the folder cannot be written.
    """
    folder = output.parent / f".{output.name}.work"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
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


def require_space(output, nbytes, folder=None):
    """Raises InputError when there is less than `nbytes` and a little free on a disk.

    Args:
        output (str | os.PathLike): what is to be written, for the message.
        nbytes (int): that are needed.
        folder (pathlib.Path | None): on that disk, or to be made there; by default the one that `output` lies in.
    """
    existing = folder or Path(output).absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if nbytes + SPARE_BYTES > free:
        raise InputError(
            f"{output}: {nbytes + SPARE_BYTES:,} bytes are needed, {free:,} are free on that disk; free "
            "some space or choose another folder"
        )


def flush(path):
    """Writes a file's data to the disk."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())

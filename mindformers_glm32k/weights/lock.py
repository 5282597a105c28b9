"""One conversion to an output at a time."""

import errno
import fcntl
import os

from mindformers_glm32k.errors import InputError


class Busy(InputError):
    """Another process is converting to the same output."""


def lock_file(path):
    """Creates and locks a file; whoever ends unlinks it and closes it. Raises Busy when another holds it."""
    while True:
        handle = open(path, "w", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                return handle
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                handle.close()
                raise Busy(f"{path}: another conversion to this output is running") from error
            if not isinstance(error, FileNotFoundError):
                raise
        handle.close()  # its last holder removed it in between: lock the new one

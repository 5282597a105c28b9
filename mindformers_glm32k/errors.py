"""The two exceptions that commands print without a traceback."""


class InputError(ValueError):
    """Bad input: a file, key, value or option that the user can correct.

    The message names the file (and line, where there is one) or the key, what was found, and what to do.
    Commands print it without a traceback and exit with status 2.
    """


class CommandFailed(RuntimeError):
    """Something that a command relies on failed, whatever the input: a process that it started, a program that it ran.

    The message says what, with the end of its log. Commands print it and exit with status 1.
    """

"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """Bad input: a file, key, value or option that the user can correct.

    The message names the file (and line, where there is one) or the key, what was found, and what to do.
    Commands print it without a traceback and exit with status 2.
    """

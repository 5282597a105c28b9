"""Checks of configuration keys and values that the data classes share."""

import argparse
import difflib
import multiprocessing

from mindformers_glm32k.errors import InputError


def reject_unknown(given, known, where):
    """Raises InputError when a configuration has a key that nobody reads.

    Args:
        given (Iterable[str]): the keys found.
        known (Iterable[str]): the keys there are.
        where (str): the section's name, for the message ("data_loader").
    """
    problems = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}; known keys are {', '.join(sorted(known))}")


def whole_number(value, name, least):
    """Returns `value` if it is an integer >= `least` (bool is none); InputError names the key otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: {value!r} is not a whole number of at least {least}")
    return value


def boolean(value, name):
    """Returns `value` if it is True or False; InputError names the key otherwise."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: {value!r} is neither True nor False")
    return value


def true_or_false(text):
    """The `type` of an argparse option that takes True or False, upper or lower case (1 and 0, yes and no, too).

    argparse's own `type=bool` takes any text that is not empty for True, "False" included.
    """
    for value, words in ((True, ("true", "1", "yes")), (False, ("false", "0", "no"))):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def choice(value, name, allowed):
    """Returns `value` if it is one of `allowed`; InputError names the key and the choices otherwise."""
    if value not in allowed:
        raise InputError(f"{name}: {value!r} is not one of {', '.join(map(str, allowed))}")
    return value


def workers(value, name):
    """Threads or processes to use: `value`, but no more than there are cores, which MindSpore refuses.

    Args:
        value (int): what the YAML asks for, >= 1.
        name (str): the key, for the message.

    Returns:
        int
    """
    return min(whole_number(value, name, 1), multiprocessing.cpu_count())

"""Checks of keys and values, shared by all modules: numbers, booleans, choices, unknown keys, "did you mean", JSON."""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import numbers
from collections.abc import Collection, Iterable
from typing import Any

from mindformers_glm32k.errors import InputError


def is_int(value: Any, least: int | None = None) -> bool:
    """Whether a value is an integer >= `least`; True and False do not count as integers."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: Any, least: float | None = None) -> bool:
    """Whether a value is a real number >= `least`; True and False do not count as numbers, NaN is below any `least`."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and (least is None or value >= least)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that `word` is most probably a typo of; None when none is similar (difflib ratio < `cutoff`)."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: ", did you mean 'x'?", or nothing."""
    near = nearest(word, known)
    return f", did you mean {near!r}?" if near else ""


def unknown_keys(given: Iterable[str], known: Collection[str]) -> list[str]:
    """One sentence for each key that nobody reads."""
    return [f"unknown key {key!r}{did_you_mean(key, known)}" for key in given if key not in known]


def reject_unknown(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Raises InputError when the section `where` of a configuration has a key that nobody reads."""
    problems = unknown_keys(given, known)
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}; known keys are {', '.join(sorted(known))}")


def whole_number(value: Any, name: str, least: int) -> int:
    """Returns `value` if it is an integer >= `least`; InputError names the key otherwise."""
    if not is_int(value, least):
        raise InputError(f"{name}: {value!r} is not a whole number of at least {least}")
    return value


def boolean(value: Any, name: str) -> bool:
    """Returns `value` if it is True or False; InputError names the key otherwise."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: {value!r} is neither True nor False")
    return value


def true_or_false(text: str, digits: bool = True) -> bool:
    """The `type` of an argparse option that takes True or False, as YAML writes them (yes and no, on and off too) and,
    with `digits`, 1 and 0.

    argparse's own `type=bool` takes any text that is not empty for True, "False" included.
    """
    for value, words, digit in ((True, ("true", "yes", "on"), "1"), (False, ("false", "no", "off"), "0")):
        if text.lower() in words or (digits and text == digit):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def choice(value: Any, name: str, allowed: Collection[Any]) -> Any:
    """Returns `value` if it is one of `allowed`; InputError names the key and the choices otherwise."""
    if value not in allowed:
        raise InputError(f"{name}: {value!r} is not one of {', '.join(map(str, allowed))}")
    return value


def workers(value: Any, name: str) -> int:
    """Threads or processes to use: `value` (>= 1), at most the number of cores: MindSpore refuses more."""
    return min(whole_number(value, name, 1), multiprocessing.cpu_count())


class UnusableJSON(InputError):
    """Well-formed JSON that is ambiguous or nested too deeply."""


def parse_json(text: str) -> Any:
    """Parses a JSON text as json.loads does, but refuses ambiguous objects.

    Raises:
        UnusableJSON: an object has a key twice with different values, of which json.loads silently keeps the last; or
            brackets are nested too deeply. The message names no file.
        ValueError: the text is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise UnusableJSON("brackets nested too deeply") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of the pairs, for json's `object_pairs_hook`; raises UnusableJSON for a key with two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise UnusableJSON(f"key {key!r} is given twice, as {value!r:.40} and {found[key]!r:.40}; remove one")
    return found


def shard_of(text: str) -> tuple[int, int]:
    """Parses the value of `--shard K/N`: (K, N), with K from 0 to N - 1; raises InputError for anything else."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise InputError(f"--shard {text}: K/N is needed with K from 0 to N - 1, such as 0/4")
    return int(number), int(count)

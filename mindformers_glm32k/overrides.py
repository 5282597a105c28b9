"""Values of YAML files and command lines as people write them, and overrides of a configuration by dotted keys, as
upstream's launcher takes them: --a.b 1 or --a.b=1.

YAML 1.1 reads `1e-5` (no dot) and `None` as strings. MindFormers' configurations are full of both, and a string where
a number was meant fails late or not at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import yaml

from mindformers_glm32k.checks import nearest
from mindformers_glm32k.errors import InputError

_NULLS = ("", "~", "null", "Null", "NULL")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def normalize_values(node: Any) -> Any:
    """Replaces, in place and at any depth, strings that look like a number in scientific notation or like None.

    Args:
        node: a dict, a list, or a leaf.

    Returns:
        the node itself, or the leaf's value.
    """
    if isinstance(node, dict):
        for key in list(node):
            dict.__setitem__(node, key, normalize_values(node[key]))
    elif isinstance(node, list):
        node[:] = [normalize_values(item) for item in node]
    elif isinstance(node, str):
        if node == "None":
            return None
        if _NUMBER.fullmatch(node):
            return float(node)
    return node


def parse_value(text: str) -> Any:
    """The value of a command-line override ("3", "1e-5", "True", "None", "[1, 2]", "a/path"), read as YAML.

    Returns:
        a number, bool or None; a list or dict where the text starts with [ or {; else the text itself, or what its
        quotes enclose.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    starts_as = {list: "[", dict: "{", str: "'\""}.get(type(value), "")
    if starts_as and not (text and text[0] in starts_as):
        # a path or a sentence, of which YAML would drop comments, anchors and block indicators
        value = text
    if value is None and text not in _NULLS or not isinstance(value, (int, float, list, dict, str, type(None))):
        return text
    return normalize_values(value)


def pairs(words: Iterable[str]) -> list[tuple[str, str]]:
    """[--a.b, 1, --c=2] -> [(a.b, 1), (c, 2)]: dotted keys and the texts of their values.

    Args:
        words: the arguments that argparse did not know.

    Raises:
        InputError: a word that is no option, an option without a value.
    """
    found, words = [], list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{word!r}: an option starting with -- is needed here")
        key, sign, value = word[2:].partition("=")
        if not all(key.split(".")):
            raise InputError(f"{word}: no key; write --key value or --section.key=value")
        if not sign:
            if not words or words[0].startswith("--"):
                raise InputError(f"--{key}: a value is needed after it")
            value = words.pop(0)
        found.append((key, value))
    return found


def reject_misspelt(leftovers: Iterable[tuple[str, str]], config: dict, options: Iterable[str]) -> None:
    """Refuses new keys of the configuration's top level that look like one of the launcher's options.

    Args:
        leftovers: from `pairs`.
        config: the configuration.
        options: names of the launcher's options.

    Raises:
        InputError: names the option that was probably meant.
    """
    for key, _ in leftovers:
        near = nearest(key, options, cutoff=0.8)
        if key not in config and near:
            raise InputError(f"--{key}: no such option; did you mean --{near}?")


def set_key(config: dict, dotted: str, value: Any, option: str) -> None:
    """Sets one key of a nested configuration.

    Args:
        config: the configuration, changed in place.
        dotted: e.g. "train_dataset.tokenizer.vocab_file", or "callbacks.2.prefix" for an item of a list.
        value: the new value; a dict becomes a section of the configuration's own type.
        option: the option that the user typed, for messages.

    Raises:
        InputError: a section or an item on the way does not exist.
    """
    *sections, leaf = dotted.split(".")
    node = config
    for depth, section in enumerate(sections):
        where = ".".join(sections[:depth]) or "the configuration"
        child = node[_item(node, section, where, option)] if isinstance(node, list) else node.get(section)
        if not isinstance(child, (dict, list)):
            near = nearest(section, node) if isinstance(node, dict) and section not in node else None
            hint = f"; did you mean {near!r}?" if near else ""
            raise InputError(f"{option}: {where} has no section {section!r}{hint}")
        node = child
    nameless = next(_nameless_keys(value), None)
    if nameless:
        raise InputError(f"{option}: {nameless[0]!r} is a key in it; keys are names, write {{name: value}}")
    if isinstance(value, dict):
        value = type(config)(**value)
    if isinstance(node, list):
        node[_item(node, leaf, ".".join(sections), option)] = value
        return
    if leaf not in node:
        near = nearest(leaf, node, cutoff=0.8)
        if near:
            logging.getLogger("mindformers").warning(
                "%s sets a new key %r; did you mean %r, which the YAML has?", option, dotted, near
            )
    node[leaf] = value


def _nameless_keys(value):
    """Yields (key,) for every key at any depth that is not a string; None can be such a key."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield from ((key,) for key in value if not isinstance(key, str))
    for child in children:
        yield from _nameless_keys(child)


def _item(items: list, text: str, where: str, option: str) -> int:
    """`text` as an index of `items`."""
    if not text.isdecimal() or int(text) >= len(items):
        raise InputError(f"{option}: {where} has {len(items)} items, numbered from 0; there is no {text}")
    return int(text)

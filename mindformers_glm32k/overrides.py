"""Overrides of a configuration by dotted keys, as upstream's launcher takes them: --a.b 1 or --a.b=1."""

import logging

from mindformers_glm32k.checks import did_you_mean, nearest
from mindformers_glm32k.errors import InputError


def pairs(words):
    """[--a.b, 1, --c=2] -> [(a.b, 1), (c, 2)]

    Args:
        words (list[str]): what the parser did not know.

    Returns:
        list[tuple[str, str]]: dotted key and text of the value.

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


def reject_misspelt(leftovers, config, options):
    """Refuses new keys of the configuration's top level that look like one of the launcher's options.

    Args:
        leftovers (list[tuple[str, str]]): from `pairs`.
        config (dict): the configuration.
        options (list[str]): names of the launcher's options.

    Raises:
        InputError: the option that was meant.
    """
    for key, _ in leftovers:
        near = nearest(key, options, cutoff=0.8)
        if key not in config and near:
            raise InputError(f"--{key}: no such option; did you mean --{near}?")


def set_key(config, dotted, value, option):
    """Sets one key of a nested configuration.

    Args:
        config (dict): the configuration.
        dotted (str): e.g. "train_dataset.tokenizer.vocab_file", or "callbacks.2.prefix" for an item of a list.
        value: the new value; a dict becomes a section of the configuration's own type.
        option (str): the option that the user typed, for messages.

    Raises:
        InputError: a section or an item on the way does not exist.
    """
    *sections, leaf = dotted.split(".")
    node = config
    for depth, section in enumerate(sections):
        where = ".".join(sections[:depth]) or "the configuration"
        child = node[_item(node, section, where, option)] if isinstance(node, list) else node.get(section)
        if not isinstance(child, (dict, list)):
            hint = "" if section in node else did_you_mean(section, node).replace(",", ";")
            raise InputError(f"{option}: {where} has no section {section!r}{hint}")
        node = child
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


def _item(items, text, where, option):
    """int: `text` as an index of `items`."""
    if not text.isdecimal() or int(text) >= len(items):
        raise InputError(f"{option}: {where} has {len(items)} items, numbered from 0; there is no {text}")
    return int(text)

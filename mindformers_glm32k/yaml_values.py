"""Values of YAML files and command lines: numbers and null as people write them.

YAML 1.1 reads `1e-5` (no dot) and `None` as strings. MindFormers' configurations are full of both, and a string where
a number was meant fails late or not at all.
"""

import re

import yaml

_NULLS = ("", "~", "null", "Null", "NULL")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def normalize_values(node):
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


def parse_value(text):
    """The value of a command-line override, read as YAML.

    Args:
        text (str): as typed, e.g. "3", "1e-5", "True", "None", "[1, 2]", "a/path".

    Returns:
        int, float, bool or None; a list or dict where the text starts with [ or {; else the text itself, or what its
        quotes enclose.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    starts_as = {list: "[", dict: "{", str: "'\""}.get(type(value), "")
    if starts_as and not (text and text[0] in starts_as):
        # YAML would take comments, anchors and block signs out of a path or a sentence
        value = text
    if value is None and text not in _NULLS or not isinstance(value, (int, float, list, dict, str, type(None))):
        return text
    return normalize_values(value)

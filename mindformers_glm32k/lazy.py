"""Faces of folders: names that are imported when they are first asked for, so that a command's --help stays light."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def face(folder: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a folder's `__init__` for its table of public names.

    No name may be its own module's: importing a module puts it under that name in the folder.

    Args:
        folder: the `__name__` of the `__init__`.
        modules: public name -> module that defines it, dotted below the folder.
    """

    def __getattr__(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(f"{folder}.{modules[name]}"), name)
        raise AttributeError(f"module {folder!r} has no attribute {name!r}")

    return __getattr__

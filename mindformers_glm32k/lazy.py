"""Public names of packages, imported on first access, so that a command's --help stays fast."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def face(folder: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a folder's `__init__` for its table of public names.

    No public name may equal a module's: importing that module would bind the name to the module.

    Args:
        folder: the `__name__` of the `__init__`.
        modules: public name -> module that defines it, relative to the folder.
    """

    def __getattr__(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(f"{folder}.{modules[name]}"), name)
        raise AttributeError(f"module {folder!r} has no attribute {name!r}")

    return __getattr__

"""Answers to prompts through upstream's text-generation pipeline."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {"ChatPromptTokenizer": "prompts", "read_prompts": "prompts"}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

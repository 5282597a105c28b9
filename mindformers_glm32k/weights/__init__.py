"""Weights: Hugging Face files to MindSpore checkpoints and back; whole checkpoints to those of all ranks and back."""

from __future__ import annotations

import importlib

# Public function -> module, imported when asked for: a command's --help stays light. No function has its module's
# name: importing a module puts it under that name here.
_MODULES = {
    "convert": "conversion",
    "convert_reversed": "conversion",
    "load_hf_weights": "conversion",
    "split": "splitting",
    "merge": "merging",
    "checkpoint_to_load": "loading",
    "is_huggingface": "loading",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

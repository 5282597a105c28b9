"""Training data: records of files, samples, tokens, batches."""

from __future__ import annotations

import importlib
from typing import Any

_FACE = {
    "GLM32KDataLoader": "loader",
    "GLM32KDataset": "dataset",
    "SampleSource": "sources",
    "Manifest": "holdout",
    "PromptTemplates": "prompts",
    "write_task": "synthetic",
}
__all__ = sorted(_FACE)


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(f"{__name__}.{_FACE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A folder that vLLM, vllm-ascend and transformers serve without code of ours, made from a checkpoint."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {"export": "folder", "write_tokenizer": "native_tokenizer"}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

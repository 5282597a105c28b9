"""The published ChatGLM3 tokenizer: its vocabulary, its chat format, and both as a MindFormers tokenizer."""

from __future__ import annotations

import importlib
from typing import Any

# Public class -> module, imported when asked for: the vocabulary and the chat format need no MindFormers, which takes
# five seconds to load.
_MODULES = {
    "GLM32KTokenizer": "glm32k_tokenizer",
    "GLM32KProcessor": "glm32k_tokenizer",
    "Vocabulary": "vocabulary",
    "WordEncoder": "word_encoder",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

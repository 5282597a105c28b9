"""LongBench: prompts as its own programs build them, predictions, scores, reports."""

import importlib

_FACE = {
    "WITHOUT_CHAT_FORMAT": "prompt_ids",
    "build_prompt_ids": "prompt_ids",
    "score_folder": "score",
    "score_rows": "score",
}
__all__ = sorted(_FACE)


def __getattr__(name):
    if name in _FACE:
        return getattr(importlib.import_module(f"{__name__}.{_FACE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

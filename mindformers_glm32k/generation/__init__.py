"""Answers to prompts through upstream's text-generation pipeline."""

from __future__ import annotations

from mindformers_glm32k.lazy import face

_FACE = {"ChatPromptTokenizer": "prompts", "read_prompts": "prompts"}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)

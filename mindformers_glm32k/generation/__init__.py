"""Answers to prompts: of a file, at a terminal, and through upstream's text-generation pipeline."""

from __future__ import annotations

from mindformers_glm32k.lazy import face

_FACE = {
    "AnswerFile": "answers",
    "Chat": "terminal",
    "ChatPromptTokenizer": "prompts",
    "Network": "network",
    "QuestionFile": "questions",
    "Sampling": "sampling",
    "answer_file": "answers",
    "read_prompts": "questions",
}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)

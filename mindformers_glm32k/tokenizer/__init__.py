"""The published ChatGLM3 tokenizer: its vocabulary, its chat format, and both as a MindFormers tokenizer."""

from __future__ import annotations

from mindformers_glm32k.lazy import face

# Public class -> module, imported when asked for: the vocabulary and the chat format need no MindFormers, which takes
# five seconds to load.
_FACE = {
    "GLM32KTokenizer": "glm32k_tokenizer",
    "GLM32KProcessor": "glm32k_tokenizer",
    "Vocabulary": "vocabulary",
    "WordEncoder": "vocabulary",
}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)

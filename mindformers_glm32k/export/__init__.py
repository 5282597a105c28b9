"""A folder that vLLM, vllm-ascend and transformers serve without code of ours, made from a checkpoint."""

from __future__ import annotations

from mindformers_glm32k.lazy import face

_FACE = {"export": "folder", "write_tokenizer": "native_tokenizer"}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)

"""Weights: Hugging Face files to MindSpore checkpoints and back; whole checkpoints to those of all ranks and back."""

from __future__ import annotations

from mindformers_glm32k.lazy import face

_FACE = {
    "convert": "conversion",
    "convert_reversed": "conversion",
    "load_hf_weights": "conversion",
    "split": "splitting",
    "merge": "merging",
    "checkpoint_to_load": "loading",
    "is_huggingface": "loading",
}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)

"""Training data: records of files, samples, tokens, batches."""

from __future__ import annotations

from mindformers_glm32k.lazy import face

_FACE = {
    "GLM32KDataLoader": "loader",
    "GLM32KDataset": "dataset",
    "SampleSource": "sources",
    "Manifest": "longbench",
    "PromptTemplates": "longbench",
    "write_task": "synthetic",
}
__all__ = sorted(_FACE)
__getattr__ = face(__name__, _FACE)

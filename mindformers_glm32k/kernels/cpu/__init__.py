"""Cells that run on any device, written for CPU: attention, layers and cache in tiles of tokens."""

__all__ = ["blocks", "paged_attention", "rms_norm", "tiled_attention", "tiled_layers"]

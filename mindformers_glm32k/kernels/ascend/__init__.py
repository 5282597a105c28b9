"""Cells for Ascend layouts: upstream's own kernels without S x S masks, and the MLP over chunks of tokens."""

__all__ = ["chunked_mlp", "flash_attention"]

"""Upstream's FlashAttention with the compressed causal mask (sparse_mode 2), so that no S x S mask exists on an NPU.

In this mode the kernel masks the upper triangle itself and takes one 2048 x 2048 uint8 matrix whatever S is
(FlashAttentionScore, "leftUpCausal", https://www.mindspore.cn/docs/en/r2.7.0/api_python/ops/mindspore.ops.flash_attention_score.html).
"""
import numpy as np
from mindspore import Tensor
from mindformers.modules.flash_attention import FlashAttention

MASK_SIZE = 2048
LEFT_UP_CAUSAL = 2


def compressed_causal_mask():
    """Tensor: (2048, 2048) uint8, 1 above the diagonal."""
    return Tensor(np.triu(np.ones((MASK_SIZE, MASK_SIZE), np.uint8), k=1))


class CompressedCausalAttention(FlashAttention):
    """FlashAttention whose mask input is `compressed_causal_mask()`."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "sparse_mode": LEFT_UP_CAUSAL})

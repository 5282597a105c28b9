"""Upstream's FlashAttention with the compressed causal mask (sparse_mode 2), so that no S x S mask exists on an NPU.

In this mode the kernel masks the upper triangle itself and takes one 2048 x 2048 uint8 matrix whatever S is
(FlashAttentionScore, "leftUpCausal", https://www.mindspore.cn/docs/en/r2.7.0/api_python/ops/mindspore.ops.flash_attention_score.html).
"""
import numpy as np
from mindspore import Layout, Tensor
from mindspore.ops.operations.nn_ops import FlashAttentionScore as _FlashAttentionScore
from mindformers.modules.flash_attention import FlashAttention

MASK_SIZE = 2048
LEFT_UP_CAUSAL = 2


def compressed_causal_mask():
    """Tensor: (2048, 2048) uint8, 1 above the diagonal."""
    return Tensor(np.triu(np.ones((MASK_SIZE, MASK_SIZE), np.uint8), k=1))


class FlashAttentionScore(_FlashAttentionScore):
    """The kernel's primitive (which it is by the name of its class); its mask is whole on every rank.

    Upstream's glm2 lays out a (B, 1, S, S) mask where heads are repeated or exchanged (Ulysses); the compressed mask
    has two axes and is not cut.
    """

    def shard(self, in_strategy=None, out_strategy=None):
        *others, mask = in_strategy
        if isinstance(mask, Layout):
            fields = mask.to_dict()
            mask = Layout(tuple(fields["device_matrix"]), tuple(fields["alias_name"]))("None", "None")
        return super().shard((*others, mask), out_strategy)


class CompressedCausalAttention(FlashAttention):
    """FlashAttention whose mask input is `compressed_causal_mask()`."""

    def __init__(self, **kwargs):
        kwargs["sparse_mode"] = LEFT_UP_CAUSAL
        super().__init__(**kwargs)
        self.flash_attention = FlashAttentionScore(
            head_num=kwargs["head_num"], keep_prob=kwargs["keep_prob"], scale_value=kwargs["scale_value"],
            pre_tokens=kwargs["pre_tokens"], next_tokens=kwargs["next_tokens"], inner_precise=0,
            input_layout=kwargs["input_layout"], sparse_mode=LEFT_UP_CAUSAL)

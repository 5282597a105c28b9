"""Upstream's FlashAttention with the compressed causal mask (sparse_mode 2), so that no S x S mask exists on an NPU.

In this mode the kernel masks the upper triangle itself and takes one 2048 x 2048 uint8 matrix whatever S is
(FlashAttentionScore, "leftUpCausal", https://www.mindspore.cn/docs/en/r2.7.0/api_python/ops/mindspore.ops.flash_attention_score.html).

Packed rows take the kernel's variable-length form (input_layout "TND"): all tokens of a device behind each other, and
where each document ends; the kernel masks each document's own upper triangle, with the same matrix. It asks for
sparse_mode 2 or 3, which are the same where a document has as many queries as keys.

Legend: B rows, S tokens of a row, N query heads, G key-value heads, D head size, K places of documents in a row.
"""

import numpy as np
from mindformers.modules.flash_attention import FlashAttention
from mindspore import Layout, Tensor
from mindspore.ops.operations.nn_ops import FlashAttentionScore as _FlashAttentionScore

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
    """FlashAttention whose mask input is `compressed_causal_mask()`, or with it the ends of documents.

    Inputs:
        query (Tensor): (B, S, N * D); key, value (Tensor): (B, S, G * D).
        attn_mask (Tensor | tuple[Tensor]): (2048, 2048) uint8; for packed rows that and (B * K,) int64, see
            `document_ends.DocumentEnds`.

    Outputs:
        Tensor: (B, S, N * D).
    """

    def __init__(self, **kwargs):
        kwargs["sparse_mode"] = LEFT_UP_CAUSAL
        super().__init__(**kwargs)

        def kernel(primitive, input_layout, keep_prob):
            return primitive(
                head_num=kwargs["head_num"],
                keep_prob=keep_prob,
                scale_value=kwargs["scale_value"],
                pre_tokens=kwargs["pre_tokens"],
                next_tokens=kwargs["next_tokens"],
                inner_precise=0,
                input_layout=input_layout,
                sparse_mode=LEFT_UP_CAUSAL,
            )

        self.flash_attention = kernel(FlashAttentionScore, kwargs["input_layout"], kwargs["keep_prob"])
        self.packed_attention = kernel(_FlashAttentionScore, "TND", 1.0)  # dropout is refused beforehand

    def shard_packed(self, data, heads, key_heads):
        """Tokens over the devices that share the rows, heads over the others.

        Args:
            data (int): parts of the rows.
            heads (int): parts of the query heads, those of Ulysses' exchange too.
            key_heads (int): parts of the key-value heads, a divisor of `heads`.
        """
        layout = Layout((data, key_heads, heads // key_heads), ("dp", "mp1", "mp2"))
        keys = layout("dp", "mp1", "None")
        self.packed_attention.shard(
            (layout("dp", ("mp1", "mp2"), "None"), keys, keys, layout("None", "None"), layout("dp"), layout("dp"))
        )

    def construct(self, query, key, value, attn_mask=None, *others):
        if not isinstance(attn_mask, tuple):
            return super().construct(query, key, value, attn_mask, *others)
        mask, ends = attn_mask
        rows, length, width = query.shape
        size = width // self.head_num
        query, key, value = (x.reshape((rows * length, -1, size)) for x in (query, key, value))
        _, _, _, context = self.packed_attention(query, key, value, None, None, None, mask, None, ends, ends)
        return context.reshape((rows, length, width))

"""Causal grouped-query attention, where upstream uses the NPU kernel FlashAttentionScore.

Legend: B batch, S tokens, G key-value heads, R query heads per key-value head, D head size.
"""

import mindspore.common.dtype as mstype
from mindspore import nn, ops
from mindspore.ops import operations as P

from mindformers_glm32k.kernels.mask import MASKED, causal_bias, differs


class CausalAttention(nn.Cell):
    """softmax(q k^T * scale + causal mask) v, each key-value head shared by R query heads without repeating it.

    Constructor and inputs are those of upstream's FlashAttention in the BSH layout, so that it can take its place;
    arguments that only tell the NPU kernel how to mask are not needed here.

    Args:
        head_num (int): G * R.
        scale_value (float): multiplies the scores.
        keep_prob (float): 1 - dropout probability of the attention weights.

    Inputs:
        query (Tensor): (B, S, G*R*D).
        key, value (Tensor): (B, S, G*D).
        attn_mask (Tensor): (B, S) int32 document ids, or None; a token sees earlier tokens of its own document.

    Outputs:
        Tensor: (B, S, G*R*D), dtype of query. Scores and softmax are in float32.
    """

    def __init__(
        self,
        head_num,
        scale_value=1.0,
        keep_prob=1.0,
        input_layout="BSH",
        sparse_mode=0,
        pre_tokens=None,
        next_tokens=None,
    ):
        super().__init__()
        self.head_num = head_num
        self.scale = float(scale_value)
        self.dropout = nn.Dropout(p=1.0 - keep_prob)
        self.scores = P.BatchMatMul(transpose_b=True)
        self.context = P.BatchMatMul()
        self.softmax = P.Softmax(-1)
        self.transpose = P.Transpose()

    def construct(self, query, key, value, attn_mask=None):
        batch, length, width = query.shape
        size = width // self.head_num
        groups = key.shape[-1] // size
        share = self.head_num // groups
        query = self.transpose(query.reshape((batch, length, groups, share, size)), (0, 2, 3, 1, 4))
        key = self.transpose(key.reshape((batch, length, groups, size)), (0, 2, 1, 3))
        value = self.transpose(value.reshape((batch, length, groups, size)), (0, 2, 1, 3))
        # (B, G, R*S, D) x (B, G, S, D)^T
        scores = self.scores(query.reshape((batch, groups, share * length, size)) * self.scale, key)
        scores = ops.cast(scores, mstype.float32).reshape((batch, groups, share, length, length))
        position = ops.arange(length)
        scores = scores + causal_bias(position, position)
        if attn_mask is not None:
            foreign = ops.cast(differs(attn_mask, attn_mask), mstype.float32) * MASKED
            scores = scores + foreign.reshape((batch, 1, 1, length, length))
        weights = self.softmax(scores)
        weights = self.dropout(ops.cast(weights, value.dtype)).reshape((batch, groups, share * length, length))
        context = self.context(weights, value).reshape((batch, groups, share, length, size))
        return self.transpose(context, (0, 3, 1, 2, 4)).reshape((batch, length, width))

    def shard(self, parallel_config):
        """Nothing to shard: portable cells run whole on each device."""

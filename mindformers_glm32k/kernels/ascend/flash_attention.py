"""Upstream's FlashAttention with the compressed causal mask (sparse_mode 2), so that no S x S mask exists on an NPU.

In this mode the kernel masks the upper triangle itself and takes one 2048 x 2048 uint8 matrix whatever S is
(FlashAttentionScore, "leftUpCausal", https://www.mindspore.cn/docs/en/r2.7.0/api_python/ops/mindspore.ops.flash_attention_score.html).

Packed sequences take the kernel's variable-length form (input_layout "TND"): the concatenated tokens of a device, and
the end of each document; the kernel masks each document's own upper triangle, with the same matrix. It requires
sparse_mode 2 or 3, which are the same where a document has as many queries as keys.

    document_ids   0 0 0 0 1 1 1 2 2 2 2 3 3      three documents and padding, room for five
    ends           4 7 11 13 13                   of this sequence; the next one's follow, from 13 on

The kernel takes cumulative lengths over all sequences of a device; room that no document fills has no tokens
(https://www.hiascend.com/document/detail/zh/canncommercial/800/apiref/aolapi/context/aclnnFlashAttentionVarLenScore.md:
a length of 0 is allowed for queries and keys together).

Legend: B sequences, S tokens of a sequence, N query heads, G key-value heads, D features of a head, K documents that a
sequence has room for.
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.modules.flash_attention import FlashAttention
from mindspore import Layout, Tensor, nn, ops
from mindspore.ops import operations as P
from mindspore.ops.operations.nn_ops import FlashAttentionScore as _FlashAttentionScore

from mindformers_glm32k.parallel import one_program

MASK_SIZE = 2048
LEFT_UP_CAUSAL = 2


def compressed_causal_mask() -> Tensor:
    """(2048, 2048) uint8, 1 above the diagonal."""
    return Tensor(np.triu(np.ones((MASK_SIZE, MASK_SIZE), np.uint8), k=1))


@ops.constexpr
def _least_ends(batch, length, room, shards):
    """Lower bounds of the ends, and offsets to add to them, where `shards` devices share the batch.

    Two constants: bounds (1, K) float32, S for the last document, so that no token is left out; offsets (B, 1) float32,
    the tokens of the device's earlier sequences.
    """
    least = np.zeros((1, room), np.float32)
    least[0, -1] = length
    before = np.arange(batch, dtype=np.float32).reshape(batch, 1) % (batch // shards) * length
    return Tensor(least), Tensor(before)


class DocumentEnds(nn.Cell):
    """Cumulative lengths of the documents of packed sequences, without a tensor of S x S.

    Args:
        room: K, documents of a sequence and one for padding.
        data: devices over which the batch is split.

    Inputs:
        document_ids (Tensor): (B, S) int32, non-decreasing from 0 in a sequence, below K. Output: (B * K,) int64.
    """

    def __init__(self, room: int, data: int):
        super().__init__()
        self.room = room
        self.shards = data if one_program() else 1
        self.arange = Tensor(np.arange(room, dtype=np.int32).reshape(1, 1, room))
        self.expand = P.ExpandDims().shard(((data, 1),))
        self.not_after = P.LessEqual().shard(((data, 1, 1), (1, 1, 1)))
        self.as_number = P.Cast().shard(((data, 1, 1),))
        self.count = P.ReduceSum().shard(((data, 1, 1),))
        self.at_least = P.Maximum().shard(((data, 1), (1, 1)))
        self.shift = P.Add().shard(((data, 1), (data, 1)))
        self.as_end = P.Cast().shard(((data, 1),))

    def construct(self, document_ids):
        batch, length = document_ids.shape
        least, before = _least_ends(batch, length, self.room, self.shards)
        inside = self.not_after(self.expand(document_ids, 2), self.arange)  # (B, S, K)
        # float32 counts exactly up to 2**24, more than any sequence has
        ends = self.count(self.as_number(inside, mstype.float32), 1)  # (B, K)
        ends = self.shift(self.at_least(ends, least), before)  # (B, K)
        return self.as_end(ends, mstype.int64).reshape((-1,))  # (B * K,)


class FlashAttentionScore(_FlashAttentionScore):
    """The kernel's primitive, found by the name of its class, with the whole mask on every rank.

    Upstream's glm2 lays out a (B, 1, S, S) mask where heads are repeated or exchanged (Ulysses); the compressed mask
    has two axes and is not sharded.
    """

    def shard(self, in_strategy: tuple | None = None, out_strategy: tuple | None = None) -> FlashAttentionScore:
        *others, mask = in_strategy
        if isinstance(mask, Layout):
            fields = mask.to_dict()
            mask = Layout(tuple(fields["device_matrix"]), tuple(fields["alias_name"]))("None", "None")
        return super().shard((*others, mask), out_strategy)


class CompressedCausalAttention(FlashAttention):
    """FlashAttention with `compressed_causal_mask()` as its mask; for packed sequences with the documents' ends, too.

    Inputs:
        query (Tensor): (B, S, N * D), key, value (Tensor): (B, S, G * D).
        attn_mask (Tensor | tuple[Tensor]): (2048, 2048) uint8; for packed sequences that and (B * K,)
            int64, see DocumentEnds.

    Outputs:
        Tensor: (B, S, N * D).
    """

    def __init__(self, **kwargs):
        kwargs["sparse_mode"] = LEFT_UP_CAUSAL
        super().__init__(**kwargs)
        common = {name: kwargs[name] for name in ("head_num", "scale_value", "pre_tokens", "next_tokens")}
        common.update(inner_precise=0, sparse_mode=LEFT_UP_CAUSAL)
        layout, keep_prob = kwargs["input_layout"], kwargs["keep_prob"]
        self.flash_attention = FlashAttentionScore(input_layout=layout, keep_prob=keep_prob, **common)
        self.packed_attention = _FlashAttentionScore(input_layout="TND", keep_prob=1.0, **common)  # dropout is refused

    def shard_packed(self, data: int, heads: int, key_heads: int) -> None:
        """Shards tokens over the `data` devices that share the batch, heads over the others.

        Args:
            heads: shards of the query heads, including Ulysses' exchange.
            key_heads: shards of the key-value heads, a divisor of `heads`.
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
        batch, length, width = query.shape
        head_dim = width // self.head_num
        query, key, value = (x.reshape((batch * length, -1, head_dim)) for x in (query, key, value))  # (B*S, heads, D)
        _, _, _, context = self.packed_attention(query, key, value, None, None, None, mask, None, ends, ends)
        return context.reshape((batch, length, width))  # (B, S, N * D)

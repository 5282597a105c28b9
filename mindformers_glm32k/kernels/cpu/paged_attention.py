"""Attention over a paged key-value cache in tiles, where upstream uses NPU kernels (PagedAttention, ReshapeAndCache).

A call brings C tokens of each of B prompts: a chunk of one prompt's tokens (prefill), or the newest token of every
prompt (decode). Their keys and values are written into the cache in place; then a `while` loop reads the tiles of the
cache that hold tokens. One compiled program therefore serves every length, and a call costs what its tiles cost.

Legend: B prompts, C tokens of a prompt in the call, G key-value heads, R query heads per key-value head, M = R * C,
D features of a head, J tiles of seq_length, K tokens of a tile, W wide tiles (several successive tiles read as one).
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops import constexpr
from mindspore.ops import operations as P

from mindformers_glm32k.kernels.mask import MASKED
from mindformers_glm32k.kernels.rotary import Rotation

LEAST_WEIGHT = 1e-37  # of a first key without `any_scores`, see `_tile`; the smallest normal float32 is 1.2e-38


@constexpr
def rows_of_heads(batch: int, heads: int, tokens: int) -> Tensor:
    """Row b * C + c of token c of prompt b, repeated for every head: (B * heads * C,) int32, a program constant."""
    rows = np.arange(batch * tokens, dtype=np.int32).reshape(batch, 1, tokens)
    return Tensor(np.broadcast_to(rows, (batch, heads, tokens)).reshape(-1))


class PagedCache(nn.Cell):
    """Keys and values of every slot, head by head: row g * slots + slot holds those of head g, so that a head's
    rows of a block are contiguous. ScatterUpdate writes in place, at a cost that does not depend on the cache's size.

    A spare block behind the `num_blocks` takes the tokens that pad a chunk.
    """

    def __init__(self, num_blocks: int, block_size: int, heads: int, head_dim: int, dtype: mstype.Type):
        super().__init__()
        shape = (heads * (num_blocks + 1) * block_size, head_dim)
        self.key_cache = Parameter(initializer("zeros", shape, dtype), name="key_cache", requires_grad=False)
        self.value_cache = Parameter(initializer("zeros", shape, dtype), name="value_cache", requires_grad=False)
        self.write_key = P.ScatterUpdate()
        self.write_value = P.ScatterUpdate()

    def construct(self, key, value, rows):
        return self.write_key(self.key_cache, rows, key), self.write_value(self.value_cache, rows, value)


class PagedAttention(nn.Cell):
    """Stands in for upstream's InferAttention.

    Args:
        n_head, head_dim, n_kv_head: G * R, D, G.
        scale_value: multiplies the scores.
        block_size, num_blocks: tokens of a cache block, blocks of the cache.
        compute_dtype: of the cache. Inside a tile everything is float32.
        **_: arguments for the NPU kernels only; ignored.

    Inputs:
        query (Tensor): (B, C, G*R*D); key, value (Tensor): (B, C, G*D).
        batch_valid_length (tuple): the tiles to read, five int32 Tensors and a bool: order (J,) and count (), the first
            `count` indices of `order` are read, and every query must see the first key of the first one (with one
            prompt the tile that all tokens of the call lie in, with several prompts tile 0); wide tiles (W, B, G, K of
            a wide tile), as block_tables; wide_start () and wide_end (), the range to read; any_scores, see `_tile`.
        block_tables (Tensor): (J, B, G, K) int32, the cache rows of each tile. (Blocks instead of rows would need the
            cache in another shape, and a Reshape of what has been written in place copies it.)
        slot_mapping (Tensor): (B * C * G,) int32, the cache rows that the tokens are written to.
        freqs_cis (tuple): cos and sin, (B * C, 1, D) each, and an unused third entry.
        attn_mask (Tensor): (B, C) int32, the position of each token: it sees the keys up to its own.

    Outputs:
        Tensor: shape of query.
    """

    def __init__(
        self,
        n_head: int,
        head_dim: int,
        n_kv_head: int,
        scale_value: float = 1.0,
        block_size: int = 16,
        num_blocks: int = 1024,
        compute_dtype: mstype.Type = mstype.float32,
        **_,
    ):
        super().__init__()
        self.head_dim, self.groups, self.q_per_kv = head_dim, n_kv_head, n_head // n_kv_head
        self.scale = float(scale_value)
        self.paged_attention_mgr = PagedCache(num_blocks, block_size, n_kv_head, head_dim, compute_dtype)
        self.rotary_embedding = Rotation(head_dim, compute_dtype)
        self.scores = P.BatchMatMul(transpose_b=True)
        self.context = P.BatchMatMul()
        self.softmax = P.Softmax(-1)
        self.log = P.Log()
        self.log_softmax = P.LogSoftmax(-1)
        self.exp = P.Exp()
        self.sigmoid = P.Sigmoid()
        self.softplus = P.Softplus()
        self.transpose = P.Transpose()
        self.gather = P.Gather()
        self.zero, self.one = Tensor(0, mstype.int32), Tensor(1, mstype.int32)

    def construct(
        self, query, key, value, batch_valid_length, block_tables, slot_mapping, freqs_cis=None, attn_mask=None
    ):
        batch, tokens, _ = query.shape
        cos, sin, _ = freqs_cis
        query = self.rotary_embedding(query.reshape((batch * tokens, -1, self.head_dim)), cos, sin)
        key = self.rotary_embedding(key.reshape((batch * tokens, self.groups, self.head_dim)), cos, sin)
        keys, values = self.paged_attention_mgr(
            key.reshape((-1, self.head_dim)), value.reshape((-1, self.head_dim)), slot_mapping
        )
        query = ops.cast(query, mstype.float32) * self.scale
        query = query.reshape((batch, tokens, self.groups, self.q_per_kv, self.head_dim))  # (B, C, G, R, D)
        if tokens > 1:
            query = self.transpose(query, (0, 2, 3, 1, 4))  # (B, G, R, C, D)
        query = query.reshape((batch * self.groups, -1, self.head_dim))  # (B*G, M, D)
        context = self._attend(query, keys, values, block_tables, batch_valid_length, attn_mask)
        context = context.reshape((batch, self.groups, self.q_per_kv, tokens, self.head_dim))  # (B, G, R, C, D)
        if tokens > 1:
            context = self.transpose(context, (0, 3, 1, 2, 4))  # (B, C, G, R, D)
        return ops.cast(context, value.dtype).reshape((batch, tokens, -1))  # (B, C, G*R*D)

    def _attend(self, query, keys, values, tables, bounds, positions):
        """Context (B*G, M, D) of query (B*G, M, D); keys and values are the cache."""
        order, count, wide, wide_start, wide_end, any_scores = bounds
        first = self.gather(order, self.zero, 0)
        context, log_sum = self._tile(query, keys, values, tables, first, positions, any_scores)
        # with one prompt the other tiles precede all queries: no mask; several prompts differ in length
        hidden = positions if positions.shape[0] > 1 else None
        i = self.one
        while i < count:
            tile = self._tile(query, keys, values, tables, self.gather(order, i, 0), hidden, any_scores)
            context, log_sum = self._merge(context, log_sum, tile)
            i = i + self.one
        if wide.shape[0] > 1:  # a single one is a placeholder
            j = wide_start
            while j < wide_end:
                tile = self._tile(query, keys, values, wide, j, hidden, any_scores)
                context, log_sum = self._merge(context, log_sum, tile)
                j = j + self.one
        return context

    def _tile(self, query, keys, values, tables, j, positions, any_scores):
        """Context (B*G, M, D) over tile j and log-sum-exp of its scores (B*G, M, 1); without positions, unmasked.

        A mask hides the last keys of a tile: a query that does not see the first key sees none of the tile, and its
        log-sum-exp, some -1e30, weighs nothing in a merge.

        The log-sum-exp follows from the first key's score and weight. With `any_scores` the weight is computed as a
        logarithm, however small; without, in a third of the time, it must not underflow (a score 85 below the tile's
        largest), or the log-sum-exp is NaN, and so is the query's context where there are several tiles.
        """
        rows = self.gather(tables, j, 0).reshape((query.shape[0], -1))  # (B*G, K)
        key = ops.cast(self.gather(keys, rows, 0), mstype.float32)  # (B*G, K, D)
        value = ops.cast(self.gather(values, rows, 0), mstype.float32)
        scores = self.scores(query, key)  # (B*G, M, K)
        if positions is not None:
            scores = scores + self._mask(positions, j, scores.shape[-1])
        if any_scores:
            logarithms = self.log_softmax(scores)
            return self.context(self.exp(logarithms), value), scores[:, :, :1] - logarithms[:, :, :1]
        weights = self.softmax(scores)
        return self.context(weights, value), scores[:, :, :1] - self.log(weights[:, :, :1] - LEAST_WEIGHT)

    def _mask(self, positions, j, length):
        """Additive mask (B*G, M, K) of tile j, which hides the keys behind each query's position (B, C).

        It has the full shape of the scores, once for all layers: adding a smaller tensor is slower and keeps four
        buffers of the sum's size in every layer's kernel. Gather repeats rows three times as fast as BroadcastTo.
        """
        batch, tokens = positions.shape
        position = ops.arange(length) + j * length
        hidden = position.reshape((1, length)) > positions.reshape((batch * tokens, 1))
        mask = ops.cast(hidden, mstype.float32) * MASKED  # (B*C, K)
        mask = self.gather(mask, rows_of_heads(batch, self.groups * self.q_per_kv, tokens), 0)  # (B*G*R*C, K)
        return mask.reshape((batch * self.groups, self.q_per_kv * tokens, length))  # (B*G, M, K)

    def _merge(self, context, log_sum, tile):
        """Context and log-sum-exp of the tiles so far and one more."""
        difference = tile[1] - log_sum
        share = self.sigmoid(difference)
        return context + (tile[0] - context) * share, log_sum + self.softplus(difference)

    def shard(self, parallel_config: TransformerOpParallelConfig) -> None:
        """Nothing to shard: portable cells run whole on each device."""


class NoCache(nn.Cell):
    """Takes the place of InferAttention in a model that never reads a cache (use_past false), so that no cache
    parameters are allocated, counted or saved in its checkpoints."""

    def __init__(self, *_, **__):
        super().__init__()
        self.rotary_embedding = nn.Cell()

    def shard(self, parallel_config: TransformerOpParallelConfig) -> None:
        """Nothing to shard."""

"""Causal grouped-query attention on CPU in tiles of a query and a key block, where upstream uses the NPU kernel
FlashAttentionScore: memory is linear in the length, key-value heads are never repeated.

In the forward pass each tile's softmax, by LogSoftmax, is merged with the tiles before it by their log-sum-exps
(https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/1805.02867); no score overflows. The backward pass recomputes
a tile's attention weights from the log-sum-exps. The loops are `while` loops over tensors: the
compiled program is the same at every length. Everything inside a tile is float32.

Legend: B sequences, S tokens of a sequence, N blocks of the batch, C tokens of a block, G key-value heads, R query
heads per key-value head, M = R * C, D features of a head.
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

from mindformers_glm32k.kernels.cpu import blocks
from mindformers_glm32k.kernels.cpu.blocks import Buffer
from mindformers_glm32k.kernels.mask import MASKED, causal_bias, differs

PADDING_RANK = 2.0**22  # above every document's id


class CausalAttention(nn.Cell):
    """softmax(q k^T * scale + causal mask) v, for all queries at once; in PyNative mode a block of queries at a time.

    Constructor and inputs are those of upstream's FlashAttention in the BSH layout, whose place it takes; arguments
    that only tell the NPU kernel how to mask are ignored.

    Args:
        head_num: G * R.
        scale_value: multiplies the scores.
        keep_prob: 1 - dropout probability of the attention weights.

    Inputs:
        query (Tensor): (B, S, G*R*D); key, value (Tensor): (B, S, G*D).
        attn_mask (Tensor): (B, S) int32 document ids, or None; a token sees earlier tokens of its own document.

    Outputs:
        Tensor: (B, S, G*R*D), dtype of query. Scores and softmax are in float32.
    """

    def __init__(
        self,
        head_num: int,
        scale_value: float = 1.0,
        keep_prob: float = 1.0,
        input_layout: str = "BSH",
        sparse_mode: int = 0,
        pre_tokens: int | None = None,
        next_tokens: int | None = None,
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
        head_dim = width // self.head_num
        groups = key.shape[-1] // head_dim
        q_per_kv = self.head_num // groups
        query = (query * self.scale).reshape((batch, length, groups, q_per_kv, head_dim))
        query = self.transpose(query, (0, 2, 3, 1, 4))  # (B, G, R, S, D)
        key = self.transpose(key.reshape((batch, length, groups, head_dim)), (0, 2, 1, 3))  # (B, G, S, D)
        value = self.transpose(value.reshape((batch, length, groups, head_dim)), (0, 2, 1, 3))  # (B, G, S, D)
        step = length if blocks.in_graph_mode() else blocks.block_count(length)[1]
        context = ()
        for start in range(0, length, step):
            context += (self.attend_from(start, min(start + step, length), query, key, value, attn_mask),)
        context = ops.cat(context, 3) if len(context) > 1 else context[0]
        return self.transpose(context, (0, 3, 1, 2, 4)).reshape((batch, length, width))  # (B, S, G*R*D)

    def attend_from(
        self, start: int, stop: int, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None
    ) -> Tensor:
        """Context (B, G, R, Q, D) of the Q tokens from `start` to `stop`, which see K = `stop` keys."""
        batch, groups, q_per_kv, _, head_dim = query.shape
        query = query[:, :, :, start:stop].reshape((batch, groups, -1, head_dim))  # (B, G, R*Q, D)
        scores = ops.cast(self.scores(query, key[:, :, :stop]), mstype.float32)
        scores = scores.reshape((batch, groups, q_per_kv, stop - start, stop))  # (B, G, R, Q, K)
        scores = scores + causal_bias(ops.arange(start, stop), ops.arange(stop))
        if documents is not None:
            foreign = ops.cast(differs(documents[:, start:stop], documents[:, :stop]), mstype.float32) * MASKED
            scores = scores + foreign.reshape((batch, 1, 1, stop - start, stop))
        weights = self.dropout(ops.cast(self.softmax(scores), value.dtype))
        weights = weights.reshape((batch, groups, -1, stop))  # (B, G, R*Q, K)
        context = self.context(weights, value[:, :, :stop])
        return context.reshape((batch, groups, q_per_kv, stop - start, head_dim))  # (B, G, R, Q, D)

    def shard(self, parallel_config: TransformerOpParallelConfig) -> None:
        """Nothing to shard: portable cells run whole on each device."""


class VisibleBlocks(nn.Cell):
    """The key blocks that the queries of each block see, and those of them that need no mask.

    Inputs:
        documents (Tensor): (N, C) int32 below 2**22, or None where every sequence is one document.
        batch (int), count (int): B, blocks of a sequence; N = B * count.

    Outputs:
        tuple[Tensor]: (N,) int32 each: `first`, the first block with a key of a query's document; `plain`, the block
        from which on, up to the queries' own, all tokens are of one document, so that no mask is needed.
    """

    def __init__(self):
        super().__init__()
        self.least, self.most = P.ReduceMin(), P.ReduceMax()

    def construct(self, documents, batch, count):
        block = blocks.arange(count)
        start = ops.broadcast_to((blocks.arange(batch) * count).reshape((batch, 1)), (batch, count))
        if documents is None:
            first = start.reshape((batch * count,))  # (N,)
            return first, first
        # the range of ids in each block; ids below 0, of padding, are raised above the non-decreasing ids before them
        ids = ops.cast(documents.reshape((batch, count, -1)), mstype.float32)  # (B, count, C)
        ids = ids + ops.cast(ids < 0, mstype.float32) * PADDING_RANK
        low, high = self.least(ids, -1), self.most(ids, -1)  # (B, count)
        earlier = block.reshape((1, 1, count)) < block.reshape((1, count, 1))  # (1, query block, key block)
        low_key, high_key = ops.expand_dims(low, 1), ops.expand_dims(high, 1)  # (B, 1, count)
        low_query, high_query = ops.expand_dims(low, 2), ops.expand_dims(high, 2)  # (B, count, 1)
        overlap = ops.logical_and(low_key <= high_query, high_key >= low_query)
        overlap = ops.cast(ops.logical_and(overlap, earlier), mstype.float32)
        uniform = ops.logical_and(low_key == high_query, high_key == low_query)
        mixed = ops.cast(ops.logical_and(ops.logical_not(uniform), earlier), mstype.float32)
        # the index of a block in its sequence; where no earlier block overlaps, the first is the queries' own
        index = ops.cast(block, mstype.float32)
        first = self.least(index.reshape((1, 1, count)) * overlap + count * (1.0 - overlap), -1)  # (B, count)
        first = ops.minimum(first, index.reshape((1, count)))
        plain = ops.maximum(self.most((index + 1.0).reshape((1, 1, count)) * mixed, -1), first)
        return (
            (ops.cast(first, mstype.int32) + start).reshape((batch * count,)),  # (N,)
            (ops.cast(plain, mstype.int32) + start).reshape((batch * count,)),
        )


class _TileLoops(nn.Cell):
    """The loops over tiles, forward and backward; inputs are those of BlockAttention."""

    def __init__(self):
        super().__init__()
        self.dot_transposed = P.BatchMatMul(transpose_b=True)
        self.dot = P.BatchMatMul()
        self.transposed_dot = P.BatchMatMul(transpose_a=True)
        self.log_softmax = P.LogSoftmax(-1)
        self.exp = P.Exp()
        self.sigmoid = P.Sigmoid()
        self.softplus = P.Softplus()
        self.gather = P.Gather()
        self.concat = P.Concat(-1)
        self.context, self.log_sum = Buffer(), Buffer()
        self.d_query, self.d_key, self.d_value = Buffer(), Buffer(), Buffer()
        self.zero, self.one = Tensor(0, mstype.int32), Tensor(1, mstype.int32)

    def block(self, x, index):
        """The block of x at `index`, in float32."""
        return ops.cast(self.gather(x, index, 0), mstype.float32)

    def hidden(self, documents, query, key, causal):
        """Additive mask (C, C) of the tile of blocks `query` and `key`; `causal` is C on the diagonal, else 0."""
        bias = 0.0
        if documents is not None:
            key_ids, query_ids = self.gather(documents, key, 0), self.gather(documents, query, 0)  # (C,)
            bias = ops.cast(ops.expand_dims(key_ids, 0) != ops.expand_dims(query_ids, 1), mstype.float32) * MASKED
        if causal:
            position = blocks.arange(causal)
            bias = bias + causal_bias(position, position)
        return bias

    def biased(self, scores, bias):
        """scores (G, M, C) + bias (C, C)."""
        groups, queries, keys = scores.shape
        scores = scores.reshape((groups, queries // keys, keys, keys)) + bias  # (G, R, C, C)
        return scores.reshape((groups, queries, keys))  # (G, M, C)

    def softmax(self, scores, value):
        """Context (G, M, D) and log-sum-exp of the scores (G, M, 1) of a tile whose first key all queries see."""
        logarithms = self.log_softmax(scores)
        return self.dot(self.exp(logarithms), value), scores[:, :, :1] - logarithms[:, :, :1]

    def masked_softmax(self, scores, value):
        """The same where any key may be masked; a query that sees none gets some -1e30, of no weight in `merge`."""
        logarithms = self.log_softmax(scores)
        weights = self.exp(logarithms)
        # score - logarithm is the log-sum-exp at every key; masked keys have lost it to rounding, and have weight 0
        ones = ops.ones((scores.shape[0], scores.shape[2], 1), mstype.float32)
        return self.dot(weights, value), self.dot(weights * (scores - logarithms), ones)

    def merge(self, context, log_sum, tile_context, tile_log_sum):
        """Context and log-sum-exp of the tiles so far and one more."""
        share = self.sigmoid(tile_log_sum - log_sum)
        return context + (tile_context - context) * share, log_sum + self.softplus(tile_log_sum - log_sum)

    def forward(self, query, key, value, first, plain, documents):
        """Context, shape and dtype of query, and log-sum-exps (N, G, M, 1) float32."""
        count, groups, queries, _ = query.shape  # (N, G, M, D)
        tokens = key.shape[2]
        context = self.context(query, query.shape, query.dtype)
        log_sum = self.log_sum(query, (count, groups, queries, 1), mstype.float32)
        i = self.zero
        while i < count:
            query_i = self.block(query, i)
            scores = self.biased(self.dot_transposed(query_i, self.block(key, i)), self.hidden(documents, i, i, tokens))
            if documents is None:
                context_i, log_sum_i = self.softmax(scores, self.block(value, i))
            else:
                context_i, log_sum_i = self.masked_softmax(scores, self.block(value, i))
                j = self.gather(first, i, 0)
                end = self.gather(plain, i, 0)
                while j < end:
                    scores = self.dot_transposed(query_i, self.block(key, j))
                    scores = self.biased(scores, self.hidden(documents, i, j, 0))
                    tile = self.masked_softmax(scores, self.block(value, j))
                    context_i, log_sum_i = self.merge(context_i, log_sum_i, tile[0], tile[1])
                    j = j + self.one
            j = self.gather(plain, i, 0)
            while j < i:
                tile = self.softmax(self.dot_transposed(query_i, self.block(key, j)), self.block(value, j))
                context_i, log_sum_i = self.merge(context_i, log_sum_i, tile[0], tile[1])
                j = j + self.one
            context = self.context.put(context, i, ops.cast(context_i, query.dtype))
            log_sum = self.log_sum.put(log_sum, i, log_sum_i)
            i = i + self.one
        return context, log_sum

    def d_tile(self, query, gradient, key, value, bias):
        """Attention weights (G, M, C) of a tile and the gradient of its scores. The last column of query (G, M, D+1) is
        -log_sum, of gradient (G, M, D+1) -sum(gradient * context); the columns of ones below add them."""
        ones = ops.ones(key.shape[:2] + (1,), mstype.float32)
        scores = self.dot_transposed(query, self.concat((key, ones)))
        if bias is not None:
            scores = self.biased(scores, bias)
        weights = self.exp(scores)
        return weights, weights * self.dot_transposed(gradient, self.concat((value, ones)))

    def backward(self, query, key, value, first, plain, documents, context, log_sum, d_context):
        """Gradients of query, key and value."""
        count, groups, queries, _ = query.shape  # (N, G, M, D)
        tokens = key.shape[2]
        d_query = self.d_query(query, query.shape, query.dtype)
        d_key = self.d_key(query, key.shape, mstype.float32)
        d_value = self.d_value(query, key.shape, mstype.float32)
        i = self.zero
        while i < count:
            query_i, gradient_i, key_i = self.block(query, i), self.block(d_context, i), self.block(key, i)
            product = (gradient_i * self.block(context, i)).reshape((groups * queries, -1)).sum(-1)  # (G*M,)
            query_1 = self.concat((query_i, -self.gather(log_sum, i, 0)))
            gradient_1 = self.concat((gradient_i, -product.reshape((groups, queries, 1))))
            bias = self.hidden(documents, i, i, tokens)
            weights, d_scores = self.d_tile(query_1, gradient_1, key_i, self.block(value, i), bias)
            d_query_i = self.dot(d_scores, key_i)
            d_key = self.d_key.add(d_key, i, self.transposed_dot(d_scores, query_i))
            d_value = self.d_value.add(d_value, i, self.transposed_dot(weights, gradient_i))
            if documents is not None:
                j = self.gather(first, i, 0)
                end = self.gather(plain, i, 0)
                while j < end:
                    key_j = self.block(key, j)
                    bias = self.hidden(documents, i, j, 0)
                    weights, d_scores = self.d_tile(query_1, gradient_1, key_j, self.block(value, j), bias)
                    d_query_i = d_query_i + self.dot(d_scores, key_j)
                    d_key = self.d_key.add(d_key, j, self.transposed_dot(d_scores, query_i))
                    d_value = self.d_value.add(d_value, j, self.transposed_dot(weights, gradient_i))
                    j = j + self.one
            j = self.gather(plain, i, 0)
            while j < i:
                key_j = self.block(key, j)
                weights, d_scores = self.d_tile(query_1, gradient_1, key_j, self.block(value, j), None)
                d_query_i = d_query_i + self.dot(d_scores, key_j)
                d_key = self.d_key.add(d_key, j, self.transposed_dot(d_scores, query_i))
                d_value = self.d_value.add(d_value, j, self.transposed_dot(weights, gradient_i))
                j = j + self.one
            d_query = self.d_query.put(d_query, i, ops.cast(d_query_i, query.dtype))
            i = i + self.one
        return d_query, ops.cast(d_key, key.dtype), ops.cast(d_value, value.dtype)


class CausalTiles(_TileLoops):
    """Context (N, G, M, D) of sequences of one document each, and the log-sum-exps of their scores (N, G, M, 1)."""

    def construct(self, query, key, value, first):
        return self.forward(query, key, value, first, first, None)

    def bprop(self, query, key, value, first, out, dout):
        gradients = self.backward(query, key, value, first, first, None, out[0], out[1], dout[0])
        return gradients + (ops.zeros_like(first),)


class DocumentTiles(_TileLoops):
    """The same for sequences of several documents; a token sees earlier tokens of its own document."""

    def construct(self, query, key, value, first, plain, documents):
        return self.forward(query, key, value, first, plain, documents)

    def bprop(self, query, key, value, first, plain, documents, out, dout):
        gradients = self.backward(query, key, value, first, plain, documents, out[0], out[1], dout[0])
        return gradients + (ops.zeros_like(first), ops.zeros_like(plain), ops.zeros_like(documents))


class BlockAttention(nn.Cell):
    """Causal attention over blocks of tokens.

    Inputs:
        query (Tensor): (N, G, M, D), scaled; head r of group g at [n, g, r * C:(r + 1) * C].
        key, value (Tensor): (N, G, C, D).
        documents (Tensor): (N, C) int32, or None where every sequence is one document.
        first, plain (Tensor): (N,) int32, see VisibleBlocks.

    Outputs:
        Tensor: the context, shape and dtype of query.
    """

    def __init__(self):
        super().__init__()
        self.one_document, self.several_documents = CausalTiles(), DocumentTiles()

    def construct(self, query, key, value, documents, first, plain):
        if documents is None:
            return self.one_document(query, key, value, first)[0]
        return self.several_documents(query, key, value, first, plain, documents)[0]


class TiledAttention(CausalAttention):
    """CausalAttention with memory linear in S; its base class takes over with dropout and in PyNative mode."""

    def __init__(self, head_num: int, scale_value: float = 1.0, keep_prob: float = 1.0, **others):
        super().__init__(head_num, scale_value, keep_prob, **others)
        self.whole = keep_prob < 1.0
        self.visible = VisibleBlocks()
        self.attend = BlockAttention()

    def construct(self, query, key, value, attn_mask=None):
        if self.whole or not blocks.in_graph_mode():
            return super().construct(query, key, value, attn_mask)
        batch, length, width = query.shape
        head_dim = width // self.head_num
        groups = key.shape[-1] // head_dim
        q_per_kv = self.head_num // groups
        query, key = blocks.split_into_blocks(query * self.scale), blocks.split_into_blocks(key)
        value = blocks.split_into_blocks(value)
        documents = None if attn_mask is None else blocks.split_into_blocks(attn_mask)
        count, tokens = query.shape[:2]
        query = query.reshape((count, tokens, groups, q_per_kv, head_dim))  # (N, C, G, R, D)
        query = self.transpose(query, (0, 2, 3, 1, 4))  # (N, G, R, C, D)
        query = query.reshape((count, groups, q_per_kv * tokens, head_dim))  # (N, G, M, D)
        key = self.transpose(key.reshape((count, tokens, groups, head_dim)), (0, 2, 1, 3))  # (N, G, C, D)
        value = self.transpose(value.reshape((count, tokens, groups, head_dim)), (0, 2, 1, 3))  # (N, G, C, D)
        first, plain = self.visible(documents, batch, count // batch)
        context = self.attend(query, key, value, documents, first, plain)
        context = context.reshape((count, groups, q_per_kv, tokens, head_dim))  # (N, G, R, C, D)
        context = self.transpose(context, (0, 3, 1, 2, 4)).reshape((count, tokens, width))  # (N, C, G*R*D)
        return blocks.join_blocks(context, batch, length)

"""Causal grouped-query attention in tiles of blocks: memory grows with the length, key-value heads are never repeated.

Forward, each tile's softmax is taken by LogSoftmax and merged with what came before by the logarithms of the tiles'
sums (https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/1805.02867); nothing overflows, whatever the scores.
Backward, the weights of a tile are computed again from those sums. The loops are `while` loops over tensors: the
compiled program is the same at every length. Everything inside a tile is float32.

Legend: B rows, S tokens of a row, N blocks of the batch, C tokens of a block, G key-value heads, R query heads per
key-value head, M = R * C, D head size.
"""

import mindspore.common.dtype as mstype
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

from mindformers_glm32k.kernels.cpu import blocks
from mindformers_glm32k.kernels.cpu.attention import CausalAttention
from mindformers_glm32k.kernels.cpu.blocks import Buffer
from mindformers_glm32k.kernels.mask import MASKED, causal_bias

PADDING_RANK = 2.0**22  # above every document's id


class VisibleBlocks(nn.Cell):
    """From which block on the queries of a block see keys.

    Inputs:
        documents (Tensor): (N, C) int32 below 2**22, or None where every row is one document.
        batch (int), count (int): B, blocks of a row; N = B * count.

    Outputs:
        tuple[Tensor]: (N,) int32 each: the first block with a key of a query's document, and the first block from
        which on, up to the queries' own, all tokens are of one document, so that nothing is to be hidden.
    """

    def __init__(self):
        super().__init__()
        self.least, self.most = P.ReduceMin(), P.ReduceMax()

    def construct(self, documents, batch, count):
        block = blocks.numbers(count)
        start = ops.broadcast_to((blocks.numbers(batch) * count).reshape((batch, 1)), (batch, count))
        if documents is None:
            first = start.reshape((batch * count,))
            return first, first
        # a range of ids per block; padding ids below 0 would lie outside the rising ids before them
        ids = ops.cast(documents.reshape((batch, count, -1)), mstype.float32)
        ids = ids + ops.cast(ids < 0, mstype.float32) * PADDING_RANK
        low, high = self.least(ids, -1), self.most(ids, -1)
        earlier = block.reshape((1, 1, count)) < block.reshape((1, count, 1))
        overlap = ops.logical_and(
            ops.expand_dims(low, 1) <= ops.expand_dims(high, 2), ops.expand_dims(high, 1) >= ops.expand_dims(low, 2)
        )
        overlap = ops.cast(ops.logical_and(overlap, earlier), mstype.float32)
        uniform = ops.logical_and(
            ops.expand_dims(low, 1) == ops.expand_dims(high, 2), ops.expand_dims(high, 1) == ops.expand_dims(low, 2)
        )
        mixed = ops.cast(ops.logical_and(ops.logical_not(uniform), earlier), mstype.float32)
        # the number of blocks before: of the row where nothing overlaps, the queries' own is the first
        number = ops.cast(block, mstype.float32)
        first = self.least(number.reshape((1, 1, count)) * overlap + count * (1.0 - overlap), -1)
        first = ops.minimum(first, number.reshape((1, count)))
        plain = ops.maximum(self.most((number + 1.0).reshape((1, 1, count)) * mixed, -1), first)
        return (
            (ops.cast(first, mstype.int32) + start).reshape((batch * count,)),
            (ops.cast(plain, mstype.int32) + start).reshape((batch * count,)),
        )


class _Tiles(nn.Cell):
    """The loops over tiles, forward and backward; see BlockAttention."""

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
        self.context = Buffer()
        self.log_sum = Buffer()
        self.d_query = Buffer()
        self.d_key = Buffer()
        self.d_value = Buffer()
        self.zero, self.one = Tensor(0, mstype.int32), Tensor(1, mstype.int32)

    def block(self, x, index):
        """Block number `index` of x in float32."""
        return ops.cast(self.gather(x, index, 0), mstype.float32)

    def hidden(self, documents, query, key, causal):
        """Summand (C, C) of a tile's scores."""
        bias = 0.0
        if documents is not None:
            foreign = ops.expand_dims(self.gather(documents, key, 0), 0) != ops.expand_dims(
                self.gather(documents, query, 0), 1
            )
            bias = ops.cast(foreign, mstype.float32) * MASKED
        if causal:
            position = blocks.numbers(documents.shape[1] if documents is not None else causal)
            bias = bias + causal_bias(position, position)
        return bias

    def biased(self, scores, bias):
        """scores (G, M, C) + bias (C, C)."""
        groups, rows, size = scores.shape
        return (scores.reshape((groups, rows // size, size, size)) + bias).reshape((groups, rows, size))

    def softmax(self, scores, value):
        """Context (G, M, D) and log of the sum (G, M, 1) of a tile whose first key all queries see."""
        logarithms = self.log_softmax(scores)
        return self.dot(self.exp(logarithms), value), scores[:, :, :1] - logarithms[:, :, :1]

    def masked_softmax(self, scores, value):
        """The same where any key may be hidden; a query that sees none gets a sum that weighs nothing."""
        logarithms = self.log_softmax(scores)
        weights = self.exp(logarithms)
        # score - logarithm is the log of the sum at every key; hidden ones have lost it to rounding, and weigh 0
        ones = ops.ones((scores.shape[0], scores.shape[2], 1), mstype.float32)
        return self.dot(weights, value), self.dot(weights * (scores - logarithms), ones)

    def merge(self, context, log_sum, tile_context, tile_log_sum):
        share = self.sigmoid(tile_log_sum - log_sum)
        return context + (tile_context - context) * share, log_sum + self.softplus(tile_log_sum - log_sum)

    def forward(self, query, key, value, first, plain, documents):
        """Context like query, log of the sums (N, G, M, 1) float32."""
        count, groups, rows, _ = query.shape
        size = key.shape[2]
        context = self.context(query, query.shape, query.dtype)
        log_sum = self.log_sum(query, (count, groups, rows, 1), mstype.float32)
        i = self.zero
        while i < count:
            query_i = self.block(query, i)
            scores = self.biased(self.dot_transposed(query_i, self.block(key, i)), self.hidden(documents, i, i, size))
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
        """Weights (G, M, C) of a tile and the gradient of its scores; query (G, M, D+1) ends in -log_sum, gradient
        (G, M, D+1) in -sum(gradient * context)."""
        ones = ops.ones(key.shape[:2] + (1,), mstype.float32)
        scores = self.dot_transposed(query, self.concat((key, ones)))
        if bias is not None:
            scores = self.biased(scores, bias)
        weights = self.exp(scores)
        return weights, weights * self.dot_transposed(gradient, self.concat((value, ones)))

    def backward(self, query, key, value, first, plain, documents, context, log_sum, d_context):
        """Gradients of query, key and value."""
        count, groups, rows, _ = query.shape
        size = key.shape[2]
        d_query = self.d_query(query, query.shape, query.dtype)
        d_key = self.d_key(query, key.shape, mstype.float32)
        d_value = self.d_value(query, key.shape, mstype.float32)
        i = self.zero
        while i < count:
            query_i, gradient_i, key_i = self.block(query, i), self.block(d_context, i), self.block(key, i)
            product = (gradient_i * self.block(context, i)).reshape((groups * rows, -1)).sum(-1)
            query_1 = self.concat((query_i, -self.gather(log_sum, i, 0)))
            gradient_1 = self.concat((gradient_i, -product.reshape((groups, rows, 1))))
            weights, d_scores = self.d_tile(
                query_1, gradient_1, key_i, self.block(value, i), self.hidden(documents, i, i, size)
            )
            d_query_i = self.dot(d_scores, key_i)
            d_key = self.d_key.add(d_key, i, self.transposed_dot(d_scores, query_i))
            d_value = self.d_value.add(d_value, i, self.transposed_dot(weights, gradient_i))
            if documents is not None:
                j = self.gather(first, i, 0)
                end = self.gather(plain, i, 0)
                while j < end:
                    key_j = self.block(key, j)
                    weights, d_scores = self.d_tile(
                        query_1, gradient_1, key_j, self.block(value, j), self.hidden(documents, i, j, 0)
                    )
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


class BlockAttention(_Tiles):
    """Attention of rows that are one document each, on blocks.

    Inputs:
        query (Tensor): (N, G, M, D), scaled; head r of group g at [n, g, r * C:(r + 1) * C].
        key, value (Tensor): (N, G, C, D).
        first (Tensor): (N,) int32, see VisibleBlocks.

    Outputs:
        tuple[Tensor]: context, shape and dtype of query, and the logarithms of the softmax's sums (N, G, M, 1).
    """

    def construct(self, query, key, value, first):
        return self.forward(query, key, value, first, first, None)

    def bprop(self, query, key, value, first, out, dout):
        gradients = self.backward(query, key, value, first, first, None, out[0], out[1], dout[0])
        return gradients + (ops.zeros_like(first),)


class DocumentBlockAttention(_Tiles):
    """Attention of rows that hold several documents; a token sees earlier tokens of its own document.

    Inputs:
        query, key, value, first (Tensor): see BlockAttention.
        plain (Tensor): (N,) int32, see VisibleBlocks.
        documents (Tensor): (N, C) int32.

    Outputs:
        tuple[Tensor]: see BlockAttention.
    """

    def construct(self, query, key, value, first, plain, documents):
        return self.forward(query, key, value, first, plain, documents)

    def bprop(self, query, key, value, first, plain, documents, out, dout):
        gradients = self.backward(query, key, value, first, plain, documents, out[0], out[1], dout[0])
        return gradients + (ops.zeros_like(first), ops.zeros_like(plain), ops.zeros_like(documents))


class BlockwiseAttention(CausalAttention):
    """CausalAttention, with the same constructor, inputs and outputs, whose memory grows with S and not with its square.

    With attention dropout, and in PyNative mode, it is CausalAttention.
    """

    def __init__(self, head_num, scale_value=1.0, keep_prob=1.0, **others):
        super().__init__(head_num, scale_value, keep_prob, **others)
        self.whole = keep_prob < 1.0
        self.visible = VisibleBlocks()
        self.one_document = BlockAttention()
        self.several_documents = DocumentBlockAttention()

    def construct(self, query, key, value, attn_mask=None):
        if self.whole or not blocks.in_graph_mode():
            return super().construct(query, key, value, attn_mask)
        batch, length, width = query.shape
        size = width // self.head_num
        groups = key.shape[-1] // size
        share = self.head_num // groups
        query = blocks.cut(query * self.scale)
        count, tokens = query.shape[:2]
        query = self.transpose(query.reshape((count, tokens, groups, share, size)), (0, 2, 3, 1, 4))
        query = query.reshape((count, groups, share * tokens, size))
        key = self.transpose(blocks.cut(key).reshape((count, tokens, groups, size)), (0, 2, 1, 3))
        value = self.transpose(blocks.cut(value).reshape((count, tokens, groups, size)), (0, 2, 1, 3))
        context = self.attend(query, key, value, batch, None if attn_mask is None else blocks.cut(attn_mask))
        context = context.reshape((count, groups, share, tokens, size))
        context = self.transpose(context, (0, 3, 1, 2, 4)).reshape((count, tokens, width))
        return blocks.joined(context, batch, length)

    def attend(self, query, key, value, batch, documents):
        """The context of blocks; documents (N, C) or None."""
        first, plain = self.visible(documents, batch, query.shape[0] // batch)
        if documents is None:
            return self.one_document(query, key, value, first)[0]
        return self.several_documents(query, key, value, first, plain, documents)[0]

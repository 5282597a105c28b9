"""Rotary embedding whose operators are sharded, so that heads and tokens stay where they are.

Upstream's RotaryPosEmb leaves its operators without strategies: with tensor or context parallelism the compiler then
gathers the whole sequence of every layer's queries and keys for it.

Legend: B batch, N heads, S tokens, D head size.
"""

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P


def swap_matrix(size):
    """The matrix that maps pairs (x[2i], x[2i+1]) to (-x[2i+1], x[2i]).

    Args:
        size (int): even.

    Returns:
        numpy.ndarray: (size, size) float32, applied from the right.
    """
    matrix = np.zeros((size, size), np.float32)
    even = np.arange(0, size, 2)
    matrix[even + 1, even] = -1.0
    matrix[even, even + 1] = 1.0
    return matrix


class _Rotation(nn.Cell):
    """x * cos + swapped(x) * sin for one number of heads."""

    def __init__(self, dtype, head_dim, strategy, portable):
        super().__init__()
        self.dtype = dtype
        self.head_dim = head_dim
        self.portable = portable
        self.swap = Tensor(swap_matrix(head_dim), dtype)
        rows, own_rows = (strategy[2], 1), (strategy[0], 1, strategy[2], 1)
        self.cast = P.Cast()
        # on CPU BatchMatMul does not broadcast; elsewhere a reshape to two axes would move what the strategy cuts
        self.exchange = P.MatMul() if portable else P.BatchMatMul().shard((strategy, (1, 1)))
        self.scale = P.Mul().shard((strategy, rows))
        self.turn = P.Mul().shard((strategy, rows))
        self.scale_own = P.Mul().shard((strategy, own_rows))
        self.turn_own = P.Mul().shard((strategy, own_rows))
        self.add = P.Add().shard((strategy, strategy))

    def construct(self, x, cos, sin):
        dtype = x.dtype
        x = self.cast(x, self.dtype)
        if self.portable:
            swapped = self.exchange(x.reshape((-1, self.head_dim)), self.swap).reshape(x.shape)
        else:
            swapped = self.exchange(x, self.swap)
        if cos.ndim == 2:
            return self.cast(self.add(self.scale(x, cos), self.turn(swapped, sin)), dtype)
        return self.cast(self.add(self.scale_own(x, cos), self.turn_own(swapped, sin)), dtype)


class RotaryEmbedding(nn.Cell):
    """Stands where upstream's glm2 has RotaryPosEmb: called for queries and for keys.

    Args:
        config (GLM32KConfig): sizes, rotary dtype and layout (heads over mp, tokens over cp).

    Inputs:
        x (Tensor): (B, N, S, D).
        rotary_pos_emb (tuple[Tensor]): cos (S, D) and sin (S, D), 1 and 0 where a dimension is not rotated, or
            (B, 1, S, D) where each row has positions of its own; the third entry is unused.

    Outputs:
        Tensor: (B, N, S, D), dtype of x.
    """

    def __init__(self, config):
        super().__init__()
        parallel = config.parallel_config
        data, context, model = parallel.data_parallel, parallel.context_parallel, parallel.model_parallel
        self.query_heads = config.num_attention_heads
        key_model = min(config.multi_query_group_num, model)
        self.query, self.key = (
            _Rotation(config.rotary_dtype, config.kv_channels, (data, heads, context, 1), config.use_portable_cells)
            for heads in (model, key_model)
        )

    def construct(self, x, rotary_pos_emb):
        cos, sin, _ = rotary_pos_emb
        if x.shape[1] == self.query_heads:
            return self.query(x, cos, sin)
        return self.key(x, cos, sin)

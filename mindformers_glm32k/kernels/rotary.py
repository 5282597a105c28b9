"""The rotary embedding (https://arxiv.org/abs/2104.09864), as the published model has it: in the first half of a
head's features, pairs (x[2i], x[2i+1]) are rotated by the angle of their token's position.

Upstream's RotaryPosEmb leaves its operators without strategies: with tensor or context parallelism the compiler then
gathers the whole sequence of every layer's queries and keys. Here they have them, so heads and tokens stay in place.

Legend: B batch, S tokens, N heads, D features of a head.
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from mindformers_glm32k.config import GLM32KConfig


def swap_matrix(size: int) -> np.ndarray:
    """The (size, size) float32 matrix that maps pairs (x[2i], x[2i+1]) to (-x[2i+1], x[2i]), applied from the right."""
    matrix = np.zeros((size, size), np.float32)
    even = np.arange(0, size, 2)
    matrix[even + 1, even] = -1.0
    matrix[even, even + 1] = 1.0
    return matrix


class Rotation(nn.Cell):
    """x * cos + swapped(x) * sin, the one rotation of queries and keys.

    Args:
        head_dim: D, even.
        dtype: in which the products are computed.
        strategy: shards of each of the four axes (B, N, S, D) of x; None for cells that are not sharded.
        portable: for CPU, where BatchMatMul does not broadcast.

    Inputs:
        x (Tensor): (..., D), as the output.
        cos, sin (Tensor): a shape that broadcasts to x; 1 and 0 where a feature is not rotated.
    """

    def __init__(
        self, head_dim: int, dtype: mstype.Type, strategy: tuple[int, ...] | None = None, portable: bool = True
    ):
        super().__init__()
        self.dtype = dtype
        self.head_dim = head_dim
        self.portable = portable
        self.pairs = Tensor(swap_matrix(head_dim), dtype)
        self.cast = P.Cast()
        self.swap = P.MatMul() if portable else P.BatchMatMul()
        # cos and sin (S, D) that all sequences share, or (B, 1, S, D) where each sequence has positions of its own
        self.scale, self.turn, self.scale_own, self.turn_own = (P.Mul() for _ in range(4))
        self.add = P.Add()
        if strategy is not None:
            shared, own = (strategy[2], 1), (strategy[0], 1, strategy[2], 1)
            if not portable:  # a reshape to two axes would move what the strategy shards
                self.swap.shard((strategy, (1, 1)))
            self.scale.shard((strategy, shared))
            self.turn.shard((strategy, shared))
            self.scale_own.shard((strategy, own))
            self.turn_own.shard((strategy, own))
            self.add.shard((strategy, strategy))

    def construct(self, x, cos, sin):
        dtype = x.dtype
        x = self.cast(x, self.dtype)
        if self.portable:
            swapped = self.swap(x.reshape((-1, self.head_dim)), self.pairs).reshape(x.shape)  # (..., D)
        else:
            swapped = self.swap(x, self.pairs)
        if cos.ndim == 2:
            return self.cast(self.add(self.scale(x, cos), self.turn(swapped, sin)), dtype)
        return self.cast(self.add(self.scale_own(x, cos), self.turn_own(swapped, sin)), dtype)


class RotaryEmbedding(nn.Cell):
    """Takes the place of glm2's RotaryPosEmb, for queries and for keys; heads are sharded over mp, tokens over cp.

    Inputs:
        x (Tensor): (B, N, S, D), as the output.
        rotary_pos_emb (tuple[Tensor]): cos and sin, (S, D) or (B, 1, S, D); the third entry is unused.
    """

    def __init__(self, config: GLM32KConfig):
        super().__init__()
        parallel = config.parallel_config
        data, context, model = parallel.data_parallel, parallel.context_parallel, parallel.model_parallel
        self.query_heads = config.num_attention_heads
        key_model = min(config.multi_query_group_num, model)
        self.query, self.key = (
            Rotation(config.kv_channels, config.rotary_dtype, (data, heads, context, 1), config.use_portable_cells)
            for heads in (model, key_model)
        )

    def construct(self, x, rotary_pos_emb):
        cos, sin, _ = rotary_pos_emb
        if x.shape[1] == self.query_heads:
            return self.query(x, cos, sin)
        return self.key(x, cos, sin)

"""Attention over a paged key-value cache, where upstream uses NPU kernels (PagedAttention, ReshapeAndCache).

Follows the protocol of upstream's generator: prefill gets the tokens of all prompts flattened into one sequence, decode
gets one token per prompt; `slot_mapping` says where in the cache a token is kept, `block_tables` which blocks hold a
prompt. Shapes are dynamic: two graphs serve every length.

Legend: T tokens of the call, B prompts, L cache slots read, G key-value heads, R query heads per key-value head,
D features of a head.
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops import operations as P

from mindformers_glm32k.kernels.rotary import Rotation


class PagedCache(nn.Cell):
    """Keys and values by slot; writing one costs the same whatever the cache's size (ScatterUpdate is in place)."""

    def __init__(self, slots: int, width: int, dtype: mstype.Type):
        super().__init__()
        self.key_cache = Parameter(initializer("zeros", (slots, width), dtype), name="key_cache", requires_grad=False)
        self.value_cache = Parameter(
            initializer("zeros", (slots, width), dtype), name="value_cache", requires_grad=False
        )
        self.write_key = P.ScatterUpdate()
        self.write_value = P.ScatterUpdate()

    def construct(self, key, value, slot_mapping):
        return self.write_key(self.key_cache, slot_mapping, key), self.write_value(
            self.value_cache, slot_mapping, value
        )


class PagedAttention(nn.Cell):
    """Stands in for upstream's InferAttention; the model computes positions and masks (`freqs_cis`, `attn_mask`).

    Args:
        n_head, head_dim, n_kv_head: G * R, D, G.
        scale_value: multiplies the scores.
        block_size, num_blocks: tokens of a cache block, blocks of the cache.
        compute_dtype: of the cache.
        **_: what only the NPU kernels need.

    Inputs:
        query (Tensor): prefill (1, T, G*R*D), decode (B, 1, G*R*D); key, value (Tensor): the same with G*D.
        batch_valid_length (Tensor): (B,) unused here.
        block_tables (Tensor): (B, blocks) int32, -1 padded; read in decode.
        slot_mapping (Tensor): (T,) or (B,) int32.
        freqs_cis (tuple): cos (T, 1, D), sin (T, 1, D), unused.
        attn_mask (Tensor): float32 summand of the scores: prefill (T, T), decode (B, 1, L).

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
        self.head_dim = head_dim
        self.groups = n_kv_head
        self.q_per_kv = n_head // n_kv_head
        self.width = n_kv_head * head_dim
        self.scale = float(scale_value)
        self.is_first_iteration = True
        self.paged_attention_mgr = PagedCache(block_size * num_blocks, self.width, compute_dtype)
        self.rotary_embedding = Rotation(head_dim, compute_dtype)
        self.in_block = Tensor(np.arange(block_size, dtype=np.int32).reshape(1, 1, -1))
        self.block_size = block_size
        self.scores = P.BatchMatMul(transpose_b=True)
        self.context = P.BatchMatMul()
        self.softmax = P.Softmax(-1)
        self.transpose = P.Transpose()
        self.gather = P.Gather()

    def construct(
        self, query, key, value, batch_valid_length, block_tables, slot_mapping, freqs_cis=None, attn_mask=None
    ):
        shape = query.shape
        cos, sin, _ = freqs_cis
        query = self.rotary_embedding(query.reshape((-1, self.groups * self.q_per_kv, self.head_dim)), cos, sin)
        key = self.rotary_embedding(key.reshape((-1, self.groups, self.head_dim)), cos, sin)
        value = value.reshape((-1, self.groups, self.head_dim))
        keys, values = self.paged_attention_mgr(
            key.reshape((-1, self.width)), value.reshape((-1, self.width)), slot_mapping
        )
        if self.is_first_iteration:
            query = ops.depend(query, (keys, values))
            context = self._prefill(query, key, value, attn_mask)
        else:
            context = self._decode(query, keys, values, block_tables, attn_mask)
        return context.reshape(shape)

    def _prefill(self, query, key, value, bias):
        """query (T, G*R, D), key and value (T, G, D), bias (T, T) -> (T, G, R, D)."""
        query = self.transpose(query.reshape((-1, self.groups, self.q_per_kv, self.head_dim)), (1, 2, 0, 3))
        query = query.reshape((self.groups, -1, self.head_dim))  # (G, R*T, D)
        key = self.transpose(key, (1, 0, 2))
        value = self.transpose(value, (1, 0, 2))
        scores = ops.cast(self.scores(query * self.scale, key), mstype.float32)
        length = bias.shape[0]
        weights = self.softmax(scores.reshape((self.groups, self.q_per_kv, length, length)) + bias)
        weights = ops.cast(weights, value.dtype).reshape((self.groups, -1, length))
        context = self.context(weights, value).reshape((self.groups, self.q_per_kv, length, self.head_dim))
        return self.transpose(context, (2, 0, 1, 3))

    def _decode(self, query, keys, values, block_tables, bias):
        """query (B, G*R, D), keys and values (slots, G*D), bias (B, 1, L) -> (B, G, R, D)."""
        # a padded table entry (-1) reads some slot; the bias hides it
        blocks = ops.expand_dims(ops.maximum(block_tables, 0), 2)
        batch = block_tables.shape[0]
        slots = (blocks * self.block_size + self.in_block).reshape((batch, -1))
        length = slots.shape[1]
        key = self.gather(keys, slots, 0).reshape((batch, length, self.groups, self.head_dim))
        value = self.gather(values, slots, 0).reshape((batch, length, self.groups, self.head_dim))
        key = self.transpose(key, (0, 2, 1, 3))
        value = self.transpose(value, (0, 2, 1, 3))
        query = query.reshape((batch, self.groups, self.q_per_kv, self.head_dim)) * self.scale
        scores = ops.cast(self.scores(query, key), mstype.float32)
        weights = self.softmax(scores + ops.expand_dims(bias, 1))
        return self.context(ops.cast(weights, value.dtype), value)

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

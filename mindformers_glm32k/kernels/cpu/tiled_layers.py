"""Upstream's glm2 layers computed a block of tokens at a time: a layer keeps only its input, queries, keys, values and
context for the backward pass; everything in between is recomputed, again block by block.

Upstream's cells stay where they are and keep their parameters; the loops take the weights as inputs. What a loop
cannot take (LoRA adapters, dropout, split weights, biases) goes through upstream's cells, all tokens at once.

Legend: B sequences, S tokens of a sequence, N blocks of the batch, C tokens of a block, H hidden size, G key-value
heads, R query heads per key-value head, D features of a head, F feed-forward size, P positions of the rotary tables.
"""

from __future__ import annotations

import math

import mindspore.common.dtype as mstype
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
from mindformers.modules.layers import Linear
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr
from mindspore.ops import operations as P

from mindformers_glm32k.config import GLM32KConfig
from mindformers_glm32k.kernels.cpu import blocks
from mindformers_glm32k.kernels.cpu.blocks import Buffer
from mindformers_glm32k.kernels.cpu.rms_norm import RMSNormalization
from mindformers_glm32k.kernels.cpu.tiled_attention import BlockAttention, VisibleBlocks
from mindformers_glm32k.kernels.rotary import Rotation


class _LayerDims:
    """Dimensions and dtypes of the configuration that the loops use."""

    def __init__(self, config):
        self.groups = config.multi_query_group_num
        self.q_per_kv = config.num_attention_heads // self.groups
        self.head_dim = config.kv_channels
        self.query, self.key = self.groups * self.q_per_kv * self.head_dim, self.groups * self.head_dim
        self.ffn = config.ffn_hidden_size
        self.eps = config.layernorm_epsilon
        self.scale = 1.0 / math.sqrt(self.head_dim)
        self.compute, self.residual, self.rotary = config.compute_dtype, config.residual_dtype, config.rotary_dtype


class _SplitHeads(nn.Cell):
    """query_key_value's output (N, C, (R + 2) * G * D), cos and sin (N, C, D) -> query (N, G, R*C, D), rotated and
    scaled, key (N, G, C, D), rotated, and value (N, G, C, D)."""

    def __init__(self, dims):
        super().__init__()
        self.groups, self.q_per_kv, self.head_dim = dims.groups, dims.q_per_kv, dims.head_dim
        self.query, self.key, self.scale = dims.query, dims.key, dims.scale
        self.rotate = Rotation(dims.head_dim, dims.rotary)
        self.transpose = P.Transpose()

    def construct(self, mixed, cos, sin):
        count, tokens, _ = mixed.shape
        query, key = mixed[..., : self.query], mixed[..., self.query : self.query + self.key]
        value = mixed[..., self.query + self.key :]
        cos = cos.reshape((count, 1, 1, tokens, self.head_dim))  # (N, 1, 1, C, D)
        sin = sin.reshape((count, 1, 1, tokens, self.head_dim))
        query = query.reshape((count, tokens, self.groups, self.q_per_kv, self.head_dim))  # (N, C, G, R, D)
        query = self.transpose(query, (0, 2, 3, 1, 4))  # (N, G, R, C, D)
        key = self.transpose(key.reshape((count, tokens, self.groups, 1, self.head_dim)), (0, 2, 3, 1, 4))
        value = self.transpose(value.reshape((count, tokens, self.groups, self.head_dim)), (0, 2, 1, 3))  # (N, G, C, D)
        query = self.rotate(query, cos, sin) * self.scale
        return (
            query.reshape((count, self.groups, self.q_per_kv * tokens, self.head_dim)),  # (N, G, R*C, D)
            self.rotate(key, cos, sin).reshape(value.shape),  # (N, G, 1, C, D) -> (N, G, C, D)
            value,
        )


class _BlockBeforeAttention(nn.Cell):
    """x (C, H) of one block -> query (G, R*C, D), key and value (G, C, D)."""

    def __init__(self, dims):
        super().__init__()
        self.compute = dims.compute
        self.norm = RMSNormalization(dims.eps)
        self.heads = _SplitHeads(dims)
        self.matmul = P.MatMul(transpose_b=True)

    def construct(self, x, norm, weight, bias, cos, sin):
        mixed = self.matmul(ops.cast(self.norm(x, norm), self.compute), weight) + bias
        query, key, value = self.heads(ops.expand_dims(mixed, 0), ops.expand_dims(cos, 0), ops.expand_dims(sin, 0))
        return query[0], key[0], value[0]


class _BlockAfterAttention(nn.Cell):
    """context (G, R*C, D) and the layer's input x (C, H) of one block -> the layer's output (C, H)."""

    def __init__(self, dims):
        super().__init__()
        self.groups, self.q_per_kv, self.head_dim, self.ffn = dims.groups, dims.q_per_kv, dims.head_dim, dims.ffn
        self.compute, self.residual = dims.compute, dims.residual
        self.norm = RMSNormalization(dims.eps)
        self.matmul = P.MatMul(transpose_b=True)
        self.transpose = P.Transpose()
        self.sigmoid = P.Sigmoid()

    def construct(self, context, x, dense, norm, h_to_4h, four_h_to_h):
        tokens = x.shape[0]
        context = context.reshape((self.groups, self.q_per_kv, tokens, self.head_dim))  # (G, R, C, D)
        context = self.transpose(context, (2, 0, 1, 3)).reshape((tokens, -1))  # (C, G*R*D)
        x = ops.cast(x, self.residual) + ops.cast(self.matmul(context, dense), self.residual)
        wide = self.matmul(ops.cast(self.norm(x, norm), self.compute), h_to_4h)  # (C, 2*F)
        gate, up = wide[:, : self.ffn], wide[:, self.ffn :]
        out = self.matmul(gate * self.sigmoid(gate) * up, four_h_to_h)
        return x + ops.cast(out, self.residual)


class _BlockLoop(nn.Cell):
    """The base of both loops over blocks; where `frozen`, the weights are not trained and their gradients are zeros."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen = frozen
        self.gather = P.Gather()
        self.add = P.Add()
        self.zero, self.one = Tensor(0, mstype.int32), Tensor(1, mstype.int32)
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def zeros(self, weight):
        """The sum of a weight's gradients before the first block, in float32."""
        return ops.zeros(weight.shape, mstype.float32)

    def accumulate(self, gradient, of_block):
        """The sum so far and one more block's gradient, which the compiler does not compute for a frozen weight."""
        if self.frozen:
            return gradient
        return self.add(gradient, of_block)


class _BeforeAttention(_BlockLoop):
    """Norm, queries, keys, values and rotation, a block at a time; cos and sin are the rotary tables (P, D).

    Inputs:
        x (Tensor): (N, C, H), positions (Tensor): (N, C) int32.
        norm (Tensor): (H,), weight (Tensor): ((R + 2) * G * D, H), bias (Tensor): ((R + 2) * G * D,).

    Outputs:
        tuple[Tensor]: query (N, G, R*C, D), key and value (N, G, C, D).
    """

    def __init__(self, dims, cos, sin, frozen):
        super().__init__(frozen)
        self.groups, self.q_per_kv, self.head_dim = dims.groups, dims.q_per_kv, dims.head_dim
        self.compute, self.cos, self.sin = dims.compute, cos, sin
        self.one_block = _BlockBeforeAttention(dims)
        self.query, self.key, self.value, self.d_x = Buffer(), Buffer(), Buffer(), Buffer()

    def rotary(self, positions, i):
        """cos and sin (C, D) of block i."""
        position = self.gather(positions, i, 0)
        return self.gather(self.cos, position, 0), self.gather(self.sin, position, 0)

    def construct(self, x, positions, norm, weight, bias):
        count, tokens = positions.shape
        query = self.query(x, (count, self.groups, self.q_per_kv * tokens, self.head_dim), self.compute)
        key = self.key(x, (count, self.groups, tokens, self.head_dim), self.compute)
        value = self.value(x, (count, self.groups, tokens, self.head_dim), self.compute)
        i = self.zero
        while i < count:
            cos, sin = self.rotary(positions, i)
            query_i, key_i, value_i = self.one_block(self.gather(x, i, 0), norm, weight, bias, cos, sin)
            query, key = self.query.put(query, i, query_i), self.key.put(key, i, key_i)
            value = self.value.put(value, i, value_i)
            i = i + self.one
        return query, key, value

    def bprop(self, x, positions, norm, weight, bias, out, dout):
        return self.backward(x, positions, norm, weight, bias, dout)

    def backward(self, x, positions, norm, weight, bias, dout):
        """Gradients of the inputs; apart from bprop, which itself cannot contain a loop around GradOperation."""
        d_x = self.d_x(x, x.shape, x.dtype)
        d_norm, d_weight, d_bias = self.zeros(norm), self.zeros(weight), self.zeros(bias)
        i = self.zero
        while i < positions.shape[0]:
            cos, sin = self.rotary(positions, i)
            d_outputs = (self.gather(dout[0], i, 0), self.gather(dout[1], i, 0), self.gather(dout[2], i, 0))
            gradients = self.gradients(self.one_block)(self.gather(x, i, 0), norm, weight, bias, cos, sin, d_outputs)
            d_x = self.d_x.put(d_x, i, gradients[0])
            d_norm = self.accumulate(d_norm, gradients[1])
            d_weight = self.accumulate(d_weight, gradients[2])
            d_bias = self.accumulate(d_bias, gradients[3])
            i = i + self.one
        d_weights = (ops.cast(d_norm, norm.dtype), ops.cast(d_weight, weight.dtype), ops.cast(d_bias, bias.dtype))
        return (d_x, ops.zeros_like(positions)) + d_weights


class _AfterAttention(_BlockLoop):
    """Projection, residual, norm and MLP, a block at a time.

    Inputs:
        context (Tensor): (N, G, R*C, D), x (Tensor): (N, C, H), the layer's input.
        dense (Tensor): (H, R*G*D), norm (Tensor): (H,), h_to_4h (Tensor): (2*F, H), four_h_to_h (Tensor): (H, F).

    Outputs:
        Tensor: (N, C, H), residual dtype.
    """

    def __init__(self, dims, frozen):
        super().__init__(frozen)
        self.residual = dims.residual
        self.one_block = _BlockAfterAttention(dims)
        self.output, self.d_context, self.d_x = Buffer(), Buffer(), Buffer()

    def construct(self, context, x, dense, norm, h_to_4h, four_h_to_h):
        output = self.output(x, x.shape, self.residual)
        i = self.zero
        while i < x.shape[0]:
            context_i, x_i = self.gather(context, i, 0), self.gather(x, i, 0)
            output = self.output.put(output, i, self.one_block(context_i, x_i, dense, norm, h_to_4h, four_h_to_h))
            i = i + self.one
        return output

    def bprop(self, context, x, dense, norm, h_to_4h, four_h_to_h, out, dout):
        return self.backward(context, x, dense, norm, h_to_4h, four_h_to_h, dout)

    def backward(self, context, x, dense, norm, h_to_4h, four_h_to_h, dout):
        """Gradients of the inputs; see _BeforeAttention."""
        d_context = self.d_context(x, context.shape, context.dtype)
        d_x = self.d_x(x, x.shape, x.dtype)
        d_dense, d_norm = self.zeros(dense), self.zeros(norm)
        d_h_to_4h, d_4h_to_h = self.zeros(h_to_4h), self.zeros(four_h_to_h)
        i = self.zero
        while i < x.shape[0]:
            context_i, x_i = self.gather(context, i, 0), self.gather(x, i, 0)
            gradients = self.gradients(self.one_block)(
                context_i, x_i, dense, norm, h_to_4h, four_h_to_h, self.gather(dout, i, 0)
            )
            d_context, d_x = self.d_context.put(d_context, i, gradients[0]), self.d_x.put(d_x, i, gradients[1])
            d_dense = self.accumulate(d_dense, gradients[2])
            d_norm = self.accumulate(d_norm, gradients[3])
            d_h_to_4h = self.accumulate(d_h_to_4h, gradients[4])
            d_4h_to_h = self.accumulate(d_4h_to_h, gradients[5])
            i = i + self.one
        return (
            d_context,
            d_x,
            ops.cast(d_dense, dense.dtype),
            ops.cast(d_norm, norm.dtype),
            ops.cast(d_h_to_4h, h_to_4h.dtype),
            ops.cast(d_4h_to_h, four_h_to_h.dtype),
        )


def can_tile(config: GLM32KConfig) -> bool:
    """Whether TiledTransformer computes the layers of this configuration: it supports all options, and sequences may
    be longer than a block. A loop of one block saves no memory, and is slower than upstream's cells by a third."""
    return (
        blocks.block_count(config.seq_length)[0] > 1
        and config.use_portable_cells
        and config.use_flash_attention
        and not config.use_past
        and config.attention_dropout == 0
        and not config.apply_residual_connection_post_layernorm
        and not config.post_self_attn_layernorm
        and not config.post_mlp_layernorm
    )


class TiledTransformer(ChatGLM2Transformer):
    """Upstream's ChatGLM2Transformer, its layers computed by the loops above; in PyNative mode as upstream does.

    Args:
        config: one that `can_tile`.
        cos, sin: (P, D), the rotary tables.

    Inputs:
        hidden (Tensor): (B, S, H); documents (Tensor): (B, S) int32 or None; positions (Tensor): (B, S) int32.

    Outputs:
        Tensor: (B, S, H), after the final norm.
    """

    def __init__(self, config: GLM32KConfig, cos: Tensor, sin: Tensor):
        super().__init__(config)
        dims = _LayerDims(config)
        self.cos, self.sin = cos, sin
        self.before, self.before_frozen = (_BeforeAttention(dims, cos, sin, frozen) for frozen in (False, True))
        self.after, self.after_frozen = (_AfterAttention(dims, frozen) for frozen in (False, True))
        self.heads = _SplitHeads(dims)
        self.visible = VisibleBlocks()
        self.attend = BlockAttention()
        self.gather = P.Gather()
        self.transpose = P.Transpose()
        self.residual = dims.residual
        # evaluated when the program is compiled: adapters are put in place after construction
        self.modes = constexpr(self._modes_of, reuse_result=False)
        self.no_bias = ops.zeros((dims.query + 2 * dims.key,), dims.compute)

    def _modes_of(self, index):
        """How a layer's parts before and after attention are computed: "tiled", "frozen" (tiled, with weights that are
        not trained) or "cells" (upstream's)."""
        layer = self.layers[index]
        return self._mode_before(layer), self._mode_after(layer)

    def _mode_before(self, layer):
        attention = layer.self_attention
        if not attention.qkv_concat:
            return "cells"
        linear = attention.query_key_value
        if type(linear) is not Linear or linear.activation_flag:
            return "cells"
        return blocks.tiling_mode(layer.input_layernorm, linear)

    def _mode_after(self, layer):
        if not layer.mlp.mlp_concat or layer.hidden_dropout > 0:
            return "cells"
        linears = (layer.self_attention.dense, layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h)
        if not all(map(blocks.is_plain, linears)):
            return "cells"
        return blocks.tiling_mode(layer.post_attention_layernorm, *linears)

    def construct(self, hidden, documents, positions):
        if not blocks.in_graph_mode():
            cos = ops.expand_dims(self.gather(self.cos, positions, 0), 1)  # (B, 1, S, D)
            sin = ops.expand_dims(self.gather(self.sin, positions, 0), 1)
            return super().construct(hidden, documents, (cos, sin, sin))
        batch, length, _ = hidden.shape
        x = blocks.split_into_blocks(hidden)  # (N, C, H)
        positions = blocks.split_into_blocks(positions)  # (N, C)
        documents = None if documents is None else blocks.split_into_blocks(documents)  # (N, C)
        first, plain = self.visible(documents, batch, x.shape[0] // batch)
        for i in range(self.num_layers):
            layer = self.layers[i]
            mode_before, mode_after = self.modes(i)
            if mode_before == "cells":
                query, key, value = self.before_by_cells(layer, x, positions)
            else:
                query, key, value = self.before_by_blocks(layer, x, positions, mode_before == "frozen")
            context = self.attend(query, key, value, documents, first, plain)
            if mode_after == "cells":
                x = self.after_by_cells(layer, context, x)
            else:
                x = self.after_by_blocks(layer, context, x, mode_after == "frozen")
        if self.post_layer_norm:
            x = self.cast(self.final_layernorm(x), self.compute_dtype)
        return blocks.join_blocks(x, batch, length)

    def before_by_blocks(self, layer: nn.Cell, x: Tensor, positions: Tensor, frozen: bool) -> tuple[Tensor, ...]:
        """Query, key and value of x (N, C, H), in the shapes of BlockAttention."""
        linear = layer.self_attention.query_key_value
        weight = self.cast(linear.weight, self.compute_dtype)
        bias = self.cast(linear.bias, self.compute_dtype) if linear.has_bias else self.no_bias
        if frozen:
            return self.before_frozen(x, positions, layer.input_layernorm.weight, weight, bias)
        return self.before(x, positions, layer.input_layernorm.weight, weight, bias)

    def before_by_cells(self, layer: nn.Cell, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """The same by the layer's own cells."""
        attention = layer.self_attention
        normed = self.cast(layer.input_layernorm(x), self.compute_dtype)
        if attention.qkv_concat:
            mixed = attention.query_key_value(normed)
        else:
            mixed = ops.cat((attention.wq(normed), attention.wk(normed), attention.wv(normed)), -1)
        return self.heads(mixed, self.gather(self.cos, positions, 0), self.gather(self.sin, positions, 0))

    def after_by_blocks(self, layer: nn.Cell, context: Tensor, x: Tensor, frozen: bool) -> Tensor:
        """The layer's output (N, C, H)."""
        dense = self.cast(layer.self_attention.dense.weight, self.compute_dtype)
        norm = layer.post_attention_layernorm.weight
        h_to_4h = self.cast(layer.mlp.dense_h_to_4h.weight, self.compute_dtype)
        four_h_to_h = self.cast(layer.mlp.dense_4h_to_h.weight, self.compute_dtype)
        if frozen:
            return self.after_frozen(context, x, dense, norm, h_to_4h, four_h_to_h)
        return self.after(context, x, dense, norm, h_to_4h, four_h_to_h)

    def after_by_cells(self, layer: nn.Cell, context: Tensor, x: Tensor) -> Tensor:
        """The same by the layer's own cells."""
        count, tokens, _ = x.shape
        groups, queries, head_dim = context.shape[1:]
        context = context.reshape((count, groups, queries // tokens, tokens, head_dim))  # (N, G, R, C, D)
        context = self.transpose(context, (0, 3, 1, 2, 4)).reshape((count, tokens, -1))  # (N, C, G*R*D)
        projected = layer.dropout(layer.self_attention.dense(context))
        x = self.cast(x, self.residual) + self.cast(projected, self.residual)
        out = layer.mlp(self.cast(layer.post_attention_layernorm(x), self.compute_dtype))
        return x + self.cast(layer.dropout(out), self.residual)

"""Upstream's glm2 layers computed block by block of tokens, so that what a layer keeps for its backward pass is its
input, queries, keys, values and context; everything between is computed again, a block at a time.

Upstream's cells stay where they are and keep their parameters; the loops take the weights as inputs. What a loop
cannot take (LoRA adapters, dropout, split weights, biases) goes through upstream's cells, all tokens at once.

Legend: B rows, S tokens of a row, N blocks of the batch, C tokens of a block, H hidden size, G key-value heads,
R query heads per key-value head, D head size, F feed-forward size.
"""

import math

import mindspore.common.dtype as mstype
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
from mindformers.modules.layers import Linear
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr
from mindspore.ops import operations as P

from mindformers_glm32k.kernels.cpu import blocks
from mindformers_glm32k.kernels.cpu.blocks import Buffer
from mindformers_glm32k.kernels.cpu.tiled_attention import BlockAttention, DocumentBlockAttention, VisibleBlocks
from mindformers_glm32k.kernels.rotary import swap_matrix


class _Sizes:
    """What the loops need to know of the configuration."""

    def __init__(self, config):
        self.groups = config.multi_query_group_num
        self.share = config.num_attention_heads // self.groups
        self.size = config.kv_channels
        self.query, self.key = self.groups * self.share * self.size, self.groups * self.size
        self.ffn = config.ffn_hidden_size
        self.eps = config.layernorm_epsilon
        self.scale = 1.0 / math.sqrt(self.size)
        self.compute, self.residual, self.rotary = config.compute_dtype, config.residual_dtype, config.rotary_dtype


class _Norm(nn.Cell):
    """RMSNorm in float32 with its weight as an input; see kernels/norm.py."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.mean = P.ReduceMean(keep_dims=True)
        self.rsqrt = P.Rsqrt()

    def construct(self, x, weight):
        values = ops.cast(x, mstype.float32)
        values = values * self.rsqrt(self.mean(values * values, -1) + self.eps) * ops.cast(weight, mstype.float32)
        return ops.cast(values, x.dtype)


class _Heads(nn.Cell):
    """Queries, keys and values as the attention takes them.

    Inputs:
        mixed (Tensor): (N, C, (R + 2) * G * D), output of query_key_value.
        cos, sin (Tensor): (N, C, D).

    Outputs:
        tuple[Tensor]: query (N, G, R*C, D) scaled, key and value (N, G, C, D).
    """

    def __init__(self, sizes):
        super().__init__()
        self.groups, self.share, self.size = sizes.groups, sizes.share, sizes.size
        self.query, self.key, self.scale, self.dtype = sizes.query, sizes.key, sizes.scale, sizes.rotary
        self.swap = Tensor(swap_matrix(self.size), self.dtype)
        self.matmul = P.MatMul()
        self.transpose = P.Transpose()

    def rotated(self, x, cos, sin):
        """x (N, G, R, C, D), cos and sin (N, C, D)."""
        count, _, _, tokens, size = x.shape
        cos, sin = cos.reshape((count, 1, 1, tokens, size)), sin.reshape((count, 1, 1, tokens, size))
        values = ops.cast(x, self.dtype)
        swapped = self.matmul(values.reshape((-1, size)), self.swap).reshape(x.shape)
        return ops.cast(values * cos + swapped * sin, x.dtype)

    def construct(self, mixed, cos, sin):
        count, tokens, _ = mixed.shape
        query, key = mixed[..., : self.query], mixed[..., self.query : self.query + self.key]
        value = mixed[..., self.query + self.key :]
        query = self.transpose(query.reshape((count, tokens, self.groups, self.share, self.size)), (0, 2, 3, 1, 4))
        key = self.transpose(key.reshape((count, tokens, self.groups, 1, self.size)), (0, 2, 3, 1, 4))
        value = self.transpose(value.reshape((count, tokens, self.groups, self.size)), (0, 2, 1, 3))
        query = self.rotated(query, cos, sin) * self.scale
        return (
            query.reshape((count, self.groups, self.share * tokens, self.size)),
            self.rotated(key, cos, sin).reshape(value.shape),
            value,
        )


class _BeforeBlock(nn.Cell):
    """x (C, H) of one block -> query (G, R*C, D), key and value (G, C, D)."""

    def __init__(self, sizes):
        super().__init__()
        self.compute = sizes.compute
        self.norm = _Norm(sizes.eps)
        self.heads = _Heads(sizes)
        self.matmul = P.MatMul(transpose_b=True)

    def construct(self, x, norm, weight, bias, cos, sin):
        mixed = self.matmul(ops.cast(self.norm(x, norm), self.compute), weight) + bias
        query, key, value = self.heads(ops.expand_dims(mixed, 0), ops.expand_dims(cos, 0), ops.expand_dims(sin, 0))
        return query[0], key[0], value[0]


class _AfterBlock(nn.Cell):
    """context (G, R*C, D) and the layer's input x (C, H) of one block -> the layer's output (C, H)."""

    def __init__(self, sizes):
        super().__init__()
        self.groups, self.share, self.size, self.ffn = sizes.groups, sizes.share, sizes.size, sizes.ffn
        self.compute, self.residual = sizes.compute, sizes.residual
        self.norm = _Norm(sizes.eps)
        self.matmul = P.MatMul(transpose_b=True)
        self.transpose = P.Transpose()
        self.sigmoid = P.Sigmoid()

    def construct(self, context, x, dense, norm, h_to_4h, four_h_to_h):
        tokens = x.shape[0]
        context = context.reshape((self.groups, self.share, tokens, self.size))
        context = self.transpose(context, (2, 0, 1, 3)).reshape((tokens, -1))
        x = ops.cast(x, self.residual) + ops.cast(self.matmul(context, dense), self.residual)
        wide = self.matmul(ops.cast(self.norm(x, norm), self.compute), h_to_4h)
        left, right = wide[:, : self.ffn], wide[:, self.ffn :]
        out = self.matmul(left * self.sigmoid(left) * right, four_h_to_h)
        return x + ops.cast(out, self.residual)


class _Loop(nn.Cell):
    """What both loops have."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen = frozen
        self.gather = P.Gather()
        self.add = P.Add()
        self.zero, self.one = Tensor(0, mstype.int32), Tensor(1, mstype.int32)
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def add_up(self, gradient, of_block):
        """A weight's gradient so far, in float32; the compiler drops what a frozen weight does not take."""
        if self.frozen:
            return gradient
        return self.add(gradient, of_block)


class BeforeAttention(_Loop):
    """Norm, queries, keys, values and rotation, a block at a time.

    Args:
        sizes (_Sizes), cos, sin (Tensor): (longest row, D), the rotary tables.
        frozen (bool): the weights are not trained; their gradients are zeros.

    Inputs:
        x (Tensor): (N, C, H).
        positions (Tensor): (N, C) int32.
        norm (Tensor): (H,), weight (Tensor): ((R + 2) * G * D, H), bias (Tensor): ((R + 2) * G * D,).

    Outputs:
        tuple[Tensor]: query (N, G, R*C, D), key and value (N, G, C, D).
    """

    def __init__(self, sizes, cos, sin, frozen):
        super().__init__(frozen)
        self.groups, self.share, self.size = sizes.groups, sizes.share, sizes.size
        self.compute = sizes.compute
        self.cos, self.sin = cos, sin
        self.one_block = _BeforeBlock(sizes)
        self.query, self.key, self.value = Buffer(), Buffer(), Buffer()
        self.d_x = Buffer()

    def rotary(self, positions, i):
        position = self.gather(positions, i, 0)
        return self.gather(self.cos, position, 0), self.gather(self.sin, position, 0)

    def construct(self, x, positions, norm, weight, bias):
        count, tokens = positions.shape
        query = self.query(x, (count, self.groups, self.share * tokens, self.size), self.compute)
        key = self.key(x, (count, self.groups, tokens, self.size), self.compute)
        value = self.value(x, (count, self.groups, tokens, self.size), self.compute)
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
        """Gradients of the inputs; apart from bprop, which cannot hold loops around gradients itself."""
        d_x = self.d_x(x, x.shape, x.dtype)
        d_norm = ops.zeros(norm.shape, mstype.float32)
        d_weight = ops.zeros(weight.shape, mstype.float32)
        d_bias = ops.zeros(bias.shape, mstype.float32)
        i = self.zero
        while i < positions.shape[0]:
            cos, sin = self.rotary(positions, i)
            gradients = self.gradients(self.one_block)(
                self.gather(x, i, 0),
                norm,
                weight,
                bias,
                cos,
                sin,
                (self.gather(dout[0], i, 0), self.gather(dout[1], i, 0), self.gather(dout[2], i, 0)),
            )
            d_x = self.d_x.put(d_x, i, gradients[0])
            d_norm = self.add_up(d_norm, gradients[1])
            d_weight = self.add_up(d_weight, gradients[2])
            d_bias = self.add_up(d_bias, gradients[3])
            i = i + self.one
        return (
            d_x,
            ops.zeros_like(positions),
            ops.cast(d_norm, norm.dtype),
            ops.cast(d_weight, weight.dtype),
            ops.cast(d_bias, bias.dtype),
        )


class AfterAttention(_Loop):
    """Projection, residual, norm and MLP, a block at a time.

    Args:
        sizes (_Sizes).
        frozen (bool): see BeforeAttention.

    Inputs:
        context (Tensor): (N, G, R*C, D).
        x (Tensor): (N, C, H), the layer's input.
        dense (Tensor): (H, R*G*D), norm (Tensor): (H,), h_to_4h (Tensor): (2 F, H), four_h_to_h (Tensor): (H, F).

    Outputs:
        Tensor: (N, C, H), residual dtype.
    """

    def __init__(self, sizes, frozen):
        super().__init__(frozen)
        self.residual = sizes.residual
        self.one_block = _AfterBlock(sizes)
        self.output, self.d_context, self.d_x = Buffer(), Buffer(), Buffer()

    def construct(self, context, x, dense, norm, h_to_4h, four_h_to_h):
        output = self.output(x, x.shape, self.residual)
        i = self.zero
        while i < x.shape[0]:
            output = self.output.put(
                output,
                i,
                self.one_block(self.gather(context, i, 0), self.gather(x, i, 0), dense, norm, h_to_4h, four_h_to_h),
            )
            i = i + self.one
        return output

    def bprop(self, context, x, dense, norm, h_to_4h, four_h_to_h, out, dout):
        return self.backward(context, x, dense, norm, h_to_4h, four_h_to_h, dout)

    def backward(self, context, x, dense, norm, h_to_4h, four_h_to_h, dout):
        """Gradients of the inputs; see BeforeAttention."""
        d_context = self.d_context(x, context.shape, context.dtype)
        d_x = self.d_x(x, x.shape, x.dtype)
        d_dense = ops.zeros(dense.shape, mstype.float32)
        d_norm = ops.zeros(norm.shape, mstype.float32)
        d_h_to_4h = ops.zeros(h_to_4h.shape, mstype.float32)
        d_4h_to_h = ops.zeros(four_h_to_h.shape, mstype.float32)
        i = self.zero
        while i < x.shape[0]:
            gradients = self.gradients(self.one_block)(
                self.gather(context, i, 0),
                self.gather(x, i, 0),
                dense,
                norm,
                h_to_4h,
                four_h_to_h,
                self.gather(dout, i, 0),
            )
            d_context, d_x = self.d_context.put(d_context, i, gradients[0]), self.d_x.put(d_x, i, gradients[1])
            d_dense = self.add_up(d_dense, gradients[2])
            d_norm = self.add_up(d_norm, gradients[3])
            d_h_to_4h = self.add_up(d_h_to_4h, gradients[4])
            d_4h_to_h = self.add_up(d_4h_to_h, gradients[5])
            i = i + self.one
        return (
            d_context,
            d_x,
            ops.cast(d_dense, dense.dtype),
            ops.cast(d_norm, norm.dtype),
            ops.cast(d_h_to_4h, h_to_4h.dtype),
            ops.cast(d_4h_to_h, four_h_to_h.dtype),
        )


def is_plain(cell):
    """bool: whether a cell is upstream's Linear, without bias, activation or an adapter in its place."""
    return type(cell) is Linear and not cell.has_bias and not cell.activation_flag and not cell.expert_flag


def can_loop(config):
    """bool: whether the layers of this configuration are computed by LoopedTransformer: it can, and rows may be longer
    than a block. A loop of one block saves no memory, and is slower than upstream's cells by a third."""
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


class LoopedTransformer(ChatGLM2Transformer):
    """Upstream's ChatGLM2Transformer, whose layers are computed by the loops above; in PyNative mode as upstream does.

    Args:
        config (GLM32KConfig): one that `can_loop`.
        cos, sin (Tensor): (longest row, D), the rotary tables.

    Inputs:
        hidden (Tensor): (B, S, H).
        documents (Tensor): (B, S) int32 or None.
        positions (Tensor): (B, S) int32.

    Outputs:
        Tensor: (B, S, H), after the final norm.
    """

    def __init__(self, config, cos, sin):
        super().__init__(config)
        sizes = _Sizes(config)
        self.cos, self.sin = cos, sin
        self.widths = (sizes.query, sizes.key, sizes.key)
        self.before, self.before_frozen = (BeforeAttention(sizes, cos, sin, frozen) for frozen in (False, True))
        self.after, self.after_frozen = (AfterAttention(sizes, frozen) for frozen in (False, True))
        self.heads = _Heads(sizes)
        self.visible = VisibleBlocks()
        self.one_document, self.several_documents = BlockAttention(), DocumentBlockAttention()
        self.gather = P.Gather()
        self.transpose = P.Transpose()
        self.residual = sizes.residual
        # asked when the program is compiled: adapters are put in place after construction
        self.ways = constexpr(self._ways_of, reuse_result=False)
        self.no_bias = ops.zeros((sizes.query + 2 * sizes.key,), sizes.compute)

    def _ways_of(self, number):
        """tuple[str, str]: how a layer's parts before and after attention are computed: "loop", "frozen" (a loop whose
        weights are not trained) or "cells"."""
        layer = self.layers[number]
        return self._before_way(layer), self._after_way(layer)

    def _before_way(self, layer):
        attention = layer.self_attention
        if not attention.qkv_concat:
            return "cells"
        linear = attention.query_key_value
        if type(linear) is not Linear or linear.activation_flag:
            return "cells"
        return _way(layer.input_layernorm, linear)

    def _after_way(self, layer):
        if not layer.mlp.mlp_concat or layer.hidden_dropout > 0:
            return "cells"
        linears = (layer.self_attention.dense, layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h)
        if not all(map(is_plain, linears)):
            return "cells"
        return _way(layer.post_attention_layernorm, *linears)

    def construct(self, hidden, documents, positions):
        if not blocks.in_graph_mode():
            cos = ops.expand_dims(self.gather(self.cos, positions, 0), 1)
            sin = ops.expand_dims(self.gather(self.sin, positions, 0), 1)
            return super().construct(hidden, documents, (cos, sin, sin))
        batch, length, _ = hidden.shape
        x = blocks.cut(hidden)
        positions = blocks.cut(positions)
        documents = None if documents is None else blocks.cut(documents)
        first, plain = self.visible(documents, batch, x.shape[0] // batch)
        for i in range(self.num_layers):
            layer = self.layers[i]
            way_before, way_after = self.ways(i)
            if way_before == "cells":
                query, key, value = self.before_cells(layer, x, positions)
            else:
                query, key, value = self.before_loop(layer, x, positions, way_before == "frozen")
            if documents is None:
                context = self.one_document(query, key, value, first)[0]
            else:
                context = self.several_documents(query, key, value, first, plain, documents)[0]
            if way_after == "cells":
                x = self.after_cells(layer, context, x)
            else:
                x = self.after_loop(layer, context, x, way_after == "frozen")
        if self.post_layer_norm:
            x = self.cast(self.final_layernorm(x), self.compute_dtype)
        return blocks.joined(x, batch, length)

    def before_loop(self, layer, x, positions, frozen):
        linear = layer.self_attention.query_key_value
        weight = self.cast(linear.weight, self.compute_dtype)
        bias = self.cast(linear.bias, self.compute_dtype) if linear.has_bias else self.no_bias
        if frozen:
            return self.before_frozen(x, positions, layer.input_layernorm.weight, weight, bias)
        return self.before(x, positions, layer.input_layernorm.weight, weight, bias)

    def after_loop(self, layer, context, x, frozen):
        weights = (
            self.cast(layer.self_attention.dense.weight, self.compute_dtype),
            layer.post_attention_layernorm.weight,
            self.cast(layer.mlp.dense_h_to_4h.weight, self.compute_dtype),
            self.cast(layer.mlp.dense_4h_to_h.weight, self.compute_dtype),
        )
        if frozen:
            return self.after_frozen(context, x, weights[0], weights[1], weights[2], weights[3])
        return self.after(context, x, weights[0], weights[1], weights[2], weights[3])

    def before_cells(self, layer, x, positions):
        """What before_loop does, by the layer's own cells."""
        attention = layer.self_attention
        normed = self.cast(layer.input_layernorm(x), self.compute_dtype)
        if attention.qkv_concat:
            mixed = attention.query_key_value(normed)
        else:
            mixed = ops.cat((attention.wq(normed), attention.wk(normed), attention.wv(normed)), -1)
        return self.heads(mixed, self.gather(self.cos, positions, 0), self.gather(self.sin, positions, 0))

    def after_cells(self, layer, context, x):
        """What after_loop does, by the layer's own cells."""
        count, tokens, _ = x.shape
        groups, rows, size = context.shape[1:]
        context = self.transpose(context.reshape((count, groups, rows // tokens, tokens, size)), (0, 3, 1, 2, 4))
        projected = layer.dropout(layer.self_attention.dense(context.reshape((count, tokens, -1))))
        x = self.cast(x, self.residual) + self.cast(projected, self.residual)
        out = layer.mlp(self.cast(layer.post_attention_layernorm(x), self.compute_dtype))
        return x + self.cast(layer.dropout(out), self.residual)


def _way(*cells):
    trained = any(parameter.requires_grad for cell in cells for parameter in cell.get_parameters())
    return "loop" if trained else "frozen"

"""Output layer and cross-entropy over chunks of tokens, so that float32 logits exist for one chunk at a time.

At 32768 tokens and 65024 ids a device's logits take 4.3 GB in float16, and upstream's loss keeps four float32 copies
of them (34 GB). There are three forms. TokenLoss (Ascend, a plain output layer, neither tensor parallelism nor a
pipeline) computes one chunk after the other in the backward pass, too. For any other output layer the float32 copies
are recomputed chunk by chunk; the half-precision logits stay. The output layer itself must be marked for recompute, and
no cell around both: otherwise the compiler joins the chunks' weight gradients into one product over a copy of all their
logit gradients, which takes twice the memory (found by the dry run).

TiledLoss (CPU, a plain output layer) computes the gradients in the loop of the forward pass: a block's logits exist
once, and the backward pass only scales. With p the softmax of a token's logits, l its label and w its loss weight, the
gradient of the logits is w (p - onehot(l)). The one-hot part is subtracted at the end: rows of the weight, gathered by
label, from the hidden states' gradient; hidden states, scattered by label, from the weight's gradient.

Legend: B batch, S tokens of a sequence, T tokens, N blocks, C tokens of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.core.loss import CrossEntropyLoss
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

from mindformers_glm32k.config import GLM32KConfig
from mindformers_glm32k.kernels.cpu import blocks
from mindformers_glm32k.kernels.cpu.blocks import Buffer, arange

BLOCK_LOGITS = 2**25  # logits that exist at a time: 512 tokens with the published vocabulary


class TiledLoss(nn.Cell):
    """Weighted sum of the token losses of a linear output layer without bias.

    With `frozen` the layer is not trained and its gradient is zeros; a block has at most `largest` tokens.

    Inputs:
        hidden (Tensor): (T, H), weight (Tensor): (V, H), any float type; the computation is in float32.
        labels (Tensor): (T,) int32; anything where the loss weight is 0.
        loss_weights (Tensor): (T,) float32.

    Outputs:
        tuple[Tensor]: the sum (); for bprop only, the gradients of hidden (T, H) and weight (V, H) in float32.
    """

    def __init__(self, frozen: bool, largest: int):
        super().__init__()
        self.frozen, self.largest = frozen, largest
        self.logits = P.MatMul(transpose_b=True)
        self.to_hidden = P.MatMul()
        self.to_weight = P.MatMul(transpose_a=True)
        self.log_softmax = P.LogSoftmax(-1)
        self.exp = P.Exp()
        self.gather = P.Gather()
        self.pick = P.GatherD()
        self.add_rows = P.TensorScatterAdd()
        self.d_hidden = Buffer()
        self.zero, self.one = Tensor(0, mstype.int32), Tensor(1, mstype.int32)

    def construct(self, hidden, weight, labels, loss_weights):
        tokens, width = hidden.shape
        vocab_size = weight.shape[0]
        largest = min(self.largest, max(1, BLOCK_LOGITS // vocab_size))
        labels = ops.clamp(labels, 0, vocab_size - 1)
        matrix = ops.cast(weight, mstype.float32)
        hidden_blocks = blocks.split_into_blocks(ops.expand_dims(hidden, 0), largest)  # (N, C, H)
        label_blocks = blocks.split_into_blocks(ops.expand_dims(labels, 0), largest)  # (N, C)
        weight_blocks = blocks.split_into_blocks(ops.expand_dims(loss_weights, 0), largest)  # (N, C)
        count, size = label_blocks.shape
        d_hidden = self.d_hidden(hidden, (count, size, width), mstype.float32)
        d_weight = ops.zeros((vocab_size, width), mstype.float32)
        total = ops.zeros((), mstype.float32)
        i = self.zero
        while i < count:
            hidden_i = ops.cast(self.gather(hidden_blocks, i, 0), mstype.float32)
            weights_i = self.gather(weight_blocks, i, 0).reshape((size, 1))  # (C, 1)
            logarithms = self.log_softmax(self.logits(hidden_i, matrix))  # (C, V)
            picked = self.pick(logarithms, 1, self.gather(label_blocks, i, 0).reshape((size, 1)))
            total = total - (picked * weights_i).sum()
            probabilities = self.exp(logarithms)
            d_hidden = self.d_hidden.put(d_hidden, i, self.to_hidden(probabilities, matrix) * weights_i)
            if not self.frozen:
                d_weight = d_weight + self.to_weight(probabilities, hidden_i * weights_i)
            i = i + self.one
        column = loss_weights.reshape((tokens, 1))  # (T, 1)
        d_hidden = d_hidden.reshape((count * size, width))[:tokens] - self.gather(matrix, labels, 0) * column  # (T, H)
        if not self.frozen:
            d_weight = self.add_rows(d_weight, labels.reshape((tokens, 1)), -ops.cast(hidden, mstype.float32) * column)
        return total, d_hidden, d_weight

    def bprop(self, hidden, weight, labels, loss_weights, out, dout):
        scale = dout[0]
        d_weight = ops.zeros_like(weight) if self.frozen else ops.cast(out[2] * scale, weight.dtype)
        return ops.cast(out[1] * scale, hidden.dtype), d_weight, ops.zeros_like(labels), ops.zeros_like(loss_weights)


@ops.constexpr
def chunk_bounds(length: int, size: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each chunk of `size` tokens of a sequence of `length`; the last chunk may be shorter."""
    return tuple((start, min(start + size, length)) for start in range(0, length, size))


@ops.constexpr
def minus_ones(count: int) -> Tensor:
    """-1, -1, -1, …: (count,) float32, a constant of the program."""
    return Tensor(np.full(count, -1), mstype.float32)


class TokenLoss(nn.Cell):
    """Cross-entropy of each token with a linear output layer without bias, over chunks of tokens, for programs without
    tensor and pipeline parallelism.

    The backward pass is hand-written, and each chunk in it depends on the one before: a chunk's logits, in every
    precision, are freed before the next chunk's are recomputed, and the weight gradient is accumulated chunk by chunk.
    In a backward pass by the compiler the chunks depend on the loss's gradient only, and their weight gradients are
    added at the end: in MindSpore's execution order the 16 chunks of 32768 tokens are then in memory at once, 24 GiB of
    logits and 8 GiB of gradients.

    With `frozen` the layer is not trained and its gradient is zeros.

    Inputs:
        hidden (Tensor): (R, S, H), R runs of tokens (sequences, or a context parallel rank's slices of them), sharded
            over dp x cp; S tokens of a run, T tokens of a chunk in all runs.
        weight (Tensor): (V, H) in compute_dtype, no Parameter: a hand-written backward pass would lack the operators
            that the compiler inserts behind a parameter, such as the gradients' sum over data parallel ranks.
        labels (Tensor): (R, S) int32 in [0, V).

    Outputs:
        Tensor: (R, S) float32.
    """

    def __init__(self, config: GLM32KConfig, frozen: bool):
        super().__init__()
        parallel = config.parallel_config
        runs = parallel.data_parallel * parallel.context_parallel
        self.frozen, self.chunk_size, self.dtype = frozen, config.loss_chunk_size, config.compute_dtype
        tokens = (runs, 1)
        self.split = P.StridedSlice().shard(((runs, 1, 1),))
        self.split_labels = P.StridedSlice().shard((tokens,))
        self.matmul = P.MatMul(transpose_b=True).shard((tokens, (1, 1)))
        self.log_softmax = P.LogSoftmax(-1).shard((tokens,))
        self.pick = P.GatherD().shard((tokens, tokens))
        self.negate = P.Neg().shard((tokens,))
        self.join_losses = P.Concat(1)
        # for the backward pass, where every tensor is a rank's shard
        self.logits = P.MatMul(transpose_b=True)
        self.softmax = P.Softmax(-1)
        self.add_at = P.TensorScatterAdd()
        self.to_hidden = P.MatMul()
        self.to_weight = P.MatMul(transpose_a=True)
        self.join = P.Concat(1)

    def construct(self, hidden, weight, labels):
        runs, length, width = hidden.shape
        losses = ()
        for start, stop in chunk_bounds(length, self.chunk_size):
            if start > 0:
                hidden = ops.depend(hidden, losses[-1])  # one chunk after the other
            tokens = self.split(hidden, (0, start, 0), (runs, stop, width), (1, 1, 1)).reshape((-1, width))  # (T, H)
            logits = ops.cast(self.matmul(ops.cast(tokens, self.dtype), weight), mstype.float32)  # (T, V)
            label = self.split_labels(labels, (0, start), (runs, stop), (1, 1)).reshape((-1, 1))
            loss = self.negate(self.pick(self.log_softmax(logits), 1, label))  # (T, 1)
            losses += (loss.reshape((runs, stop - start)),)
        return self.join_losses(losses) if len(losses) > 1 else losses[0]

    def bprop(self, hidden, weight, labels, out, dout):
        runs, length, width = hidden.shape
        d_hidden, d_weight, before = (), 0.0, (out, dout)
        for start, stop in chunk_bounds(length, self.chunk_size):
            # the dependency also keeps the compiler from reusing the logits of the forward pass
            tokens = ops.depend(hidden, before)[:, start:stop].reshape((-1, width))  # (T, H)
            tokens = ops.cast(tokens, self.dtype)
            probabilities = self.softmax(ops.cast(self.logits(tokens, weight), mstype.float32))  # (T, V)
            label = labels[:, start:stop].reshape((-1,))  # (T,)
            count = label.shape[0]
            difference = self.add_at(probabilities, ops.stack((arange(count), label), 1), minus_ones(count))
            d_logits = ops.cast(difference * dout[:, start:stop].reshape((-1, 1)), self.dtype)
            d_tokens = self.to_hidden(d_logits, weight)  # (T, H)
            d_hidden += (d_tokens.reshape((runs, stop - start, width)),)
            before = d_tokens
            if not self.frozen:
                part = self.to_weight(d_logits, tokens)  # (V, H)
                d_weight = part if start == 0 else d_weight + part
                before = (d_tokens, d_weight)
        if self.frozen:
            d_weight = ops.zeros_like(weight)
        d_hidden = ops.depend(self.join(d_hidden) if len(d_hidden) > 1 else d_hidden[0], before)
        return ops.cast(d_hidden, hidden.dtype), d_weight, ops.zeros_like(labels)


class ChunkedLoss(nn.Cell):
    """Weighted sum of the token losses, and the sum of the weights; tokens sharded over dp x cp, vocabulary over mp.

    Inputs:
        output_layer (Cell): hidden states -> logits; an input because a LoRA adapter may take its place, and because
            a cell that holds it would rename its parameter.
        hidden (Tensor): (B, S, H), loss_weights (Tensor): (B, S) float32.
        labels (Tensor): (B, S) int32; anything where the loss weight is 0.
        mode (str): the result of `mode(output_layer)`.

    Outputs:
        tuple[Tensor]: sum (), sum of the loss weights ().
    """

    def __init__(self, config: GLM32KConfig):
        super().__init__()
        parallel = copy.deepcopy(config.parallel_config)
        self.context = parallel.context_parallel
        self.chunk_size = config.loss_chunk_size
        parallel.data_parallel *= parallel.context_parallel
        parallel.context_parallel = 1
        if config.vocab_size % parallel.model_parallel:
            parallel.model_parallel = 1
        self.loss = CrossEntropyLoss(parallel_config=parallel, calculate_per_token_loss=True)
        self.loss.recompute()
        self.portable = config.use_portable_cells
        # in a pipeline the compiler puts the weight on the first stage, too, with its optimizer states
        self.whole_output = config.parallel_config.model_parallel == 1 and config.parallel_config.pipeline_stage == 1
        if self.portable:
            self.tiled, self.tiled_frozen = (TiledLoss(frozen, self.chunk_size) for frozen in (False, True))
        else:
            self.token_loss, self.token_loss_frozen = (TokenLoss(config, frozen) for frozen in (False, True))
            self.dtype = config.compute_dtype
            # the compiler's communication must precede TokenLoss, not enter it: it is inserted at these operators
            self.whole = P.Add().shard(((1, 1), ())).add_prim_attr("keep_alive", True)
            self.at_least = P.Maximum().shard(((parallel.data_parallel, 1), ()))
            self.at_most = P.Minimum().shard(((parallel.data_parallel, 1), ()))
            self.weigh = P.Mul().shard(((1,), (1,)))
            self.sum = P.ReduceSum().shard(((1,),))

    def construct(self, output_layer, hidden, labels, loss_weights, mode="chunked"):
        batch, length, width = hidden.shape
        if mode != "chunked" and self.portable:
            tiled = self.tiled_frozen if mode == "frozen" else self.tiled
            hidden = hidden.reshape((-1, width))  # (B*S, H)
            total = tiled(hidden, output_layer.weight, labels.reshape((-1,)), loss_weights.reshape((-1,)))[0]
            return total, loss_weights.sum()
        # a context parallel rank holds a run of tokens; chunks lie inside the runs, so that no token changes its rank
        runs, run_length = batch * self.context, length // self.context
        hidden = hidden.reshape((runs, run_length, width))  # (R, S, H)
        labels = labels.reshape((runs, run_length))  # (R, S)
        loss_weights = loss_weights.reshape((runs, run_length))  # (R, S)
        if mode != "chunked":
            weight = self.whole(ops.cast(output_layer.weight, self.dtype), 0)
            labels = self.at_most(self.at_least(labels, 0), weight.shape[0] - 1)
            loss = self.token_loss_frozen if mode == "frozen" else self.token_loss
            token_losses = loss(hidden, weight, labels).reshape((-1,))  # (R*S,)
            loss_weights = loss_weights.reshape((-1,))
            return self.sum(self.weigh(token_losses, loss_weights)), self.sum(loss_weights)
        total, count = 0.0, 0.0
        for start, stop in chunk_bounds(run_length, self.chunk_size):
            tokens = hidden[:, start:stop].reshape((-1, width))  # (runs * chunk, H)
            if start > 0:
                tokens = ops.depend(tokens, total)  # one chunk after the other
            chunk_total, chunk_count = self.loss(
                output_layer(tokens), labels[:, start:stop].reshape((-1,)), loss_weights[:, start:stop].reshape((-1,))
            )
            total, count = total + chunk_total, count + chunk_count
        return total, count

    def mode(self, output_layer: nn.Cell) -> str:
        """ "chunked", which takes any output layer; "tiled" or "frozen" (the layer is not trained) for
        TiledLoss or TokenLoss."""
        plain = self.portable or self.whole_output
        if not plain or not blocks.in_graph_mode() or not blocks.is_plain(output_layer):
            return "chunked"
        return blocks.tiling_mode(output_layer)

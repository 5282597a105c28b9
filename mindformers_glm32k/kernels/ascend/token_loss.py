"""Output layer and cross-entropy over chunks of tokens, for programs without tensor and pipeline parallelism.

The backward pass is written out, and each of its chunks waits for the one before: a chunk's logits, in every
precision, are gone before the next one's are computed again, and one gradient of the weight grows by a chunk at a time.
Left to the compiler, the chunks' backward passes wait for nothing but the loss's own gradient, and the weight gradients
of all chunks for each other: in MindSpore's orders of execution the 16 chunks of 32768 tokens then live at once, 24 GiB
of logits and 8 GiB of gradients.

Legend: R runs of tokens (sequences, or a context parallel rank's parts of them), S tokens of a run, T tokens of a chunk
in all runs, H hidden size, V vocabulary.
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

from mindformers_glm32k.config import GLM32KConfig
from mindformers_glm32k.kernels.cpu.blocks import arange


@ops.constexpr
def chunk_bounds(length: int, size: int) -> tuple[tuple[int, int], ...]:
    """First and last token (exclusive) of each chunk of `length` tokens; the last chunk may be shorter."""
    return tuple((start, min(start + size, length)) for start in range(0, length, size))


@ops.constexpr
def minus_ones(count: int) -> Tensor:
    """-1, -1, -1, …: (count,) float32, a constant of the program."""
    return Tensor(np.full(count, -1), mstype.float32)


class TokenLoss(nn.Cell):
    """Cross-entropy of each token, of a linear output layer without bias.

    A layer that is `frozen` is not trained, its gradient zeros.

    Inputs:
        hidden (Tensor): (R, S, H), R over dp x cp.
        weight (Tensor): (V, H) in compute_dtype, no Parameter: what the compiler inserts between a parameter and its
            first operator, such as the sum over data parallel ranks, a hand-written backward pass would leave out.
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
        # of the backward pass, where every tensor is a rank's part
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
            # the dependency also keeps the compiler from taking the logits of the forward pass
            tokens = ops.depend(hidden, before)[:, start:stop].reshape((-1, width))  # (T, H)
            tokens = ops.cast(tokens, self.dtype)
            probabilities = self.softmax(ops.cast(self.logits(tokens, weight), mstype.float32))  # (T, V)
            label = labels[:, start:stop].reshape((-1,))
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

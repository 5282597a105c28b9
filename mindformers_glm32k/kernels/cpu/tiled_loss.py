"""Output layer and cross-entropy in a loop over chunks of tokens that computes the gradients on its way.

The logits of a chunk exist once; the backward pass only scales. With p the softmax of a token's logits, l its label
and w its weight, the gradient of the logits is w (p - onehot(l)); the one-hot part is added at the end, as rows of
the weight taken from the hidden states' gradient and rows of hidden states taken from the weight's.

Legend: T tokens, H hidden size, V vocabulary.
"""

import mindspore.common.dtype as mstype
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

from mindformers_glm32k.kernels.cpu import blocks
from mindformers_glm32k.kernels.cpu.blocks import Buffer

CHUNK_ELEMENTS = 2**25  # logits that exist at a time; 512 tokens of the published vocabulary


class LoopedLoss(nn.Cell):
    """Weighted sum of the token losses of a linear output layer without bias.

    Args:
        frozen (bool): the layer is not trained; its gradient is zeros.
        largest (int): most tokens of a chunk.

    Inputs:
        hidden (Tensor): (T, H), any float type; the computation is in float32.
        weight (Tensor): (V, H).
        labels (Tensor): (T,) int32; anything where the weight is 0.
        weights (Tensor): (T,) float32.

    Outputs:
        tuple[Tensor]: the sum (), then its gradients of hidden and weight in float32, for the backward pass only.
    """

    def __init__(self, frozen, largest):
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

    def construct(self, hidden, weight, labels, weights):
        tokens, width = hidden.shape
        words = weight.shape[0]
        largest = min(self.largest, max(1, CHUNK_ELEMENTS // words))
        labels = ops.clamp(labels, 0, words - 1)
        matrix = ops.cast(weight, mstype.float32)
        hidden_c = blocks.cut(ops.expand_dims(hidden, 0), largest)
        labels_c = blocks.cut(ops.expand_dims(labels, 0), largest)
        weights_c = blocks.cut(ops.expand_dims(weights, 0), largest)
        count, size = labels_c.shape
        d_hidden = self.d_hidden(hidden, (count, size, width), mstype.float32)
        d_weight = ops.zeros((words, width), mstype.float32)
        total = ops.zeros((), mstype.float32)
        i = self.zero
        while i < count:
            chunk = ops.cast(self.gather(hidden_c, i, 0), mstype.float32)
            token_weights = self.gather(weights_c, i, 0).reshape((size, 1))
            logarithms = self.log_softmax(self.logits(chunk, matrix))
            picked = self.pick(logarithms, 1, self.gather(labels_c, i, 0).reshape((size, 1)))
            total = total - (picked * token_weights).sum()
            probabilities = self.exp(logarithms)
            d_hidden = self.d_hidden.put(d_hidden, i, self.to_hidden(probabilities, matrix) * token_weights)
            if not self.frozen:
                d_weight = d_weight + self.to_weight(probabilities, chunk * token_weights)
            i = i + self.one
        column = weights.reshape((tokens, 1))
        d_hidden = d_hidden.reshape((count * size, width))[:tokens] - self.gather(matrix, labels, 0) * column
        if not self.frozen:
            d_weight = self.add_rows(d_weight, labels.reshape((tokens, 1)), -ops.cast(hidden, mstype.float32) * column)
        return total, d_hidden, d_weight

    def bprop(self, hidden, weight, labels, weights, out, dout):
        scale = dout[0]
        d_weight = ops.zeros_like(weight) if self.frozen else ops.cast(out[2] * scale, weight.dtype)
        return ops.cast(out[1] * scale, hidden.dtype), d_weight, ops.zeros_like(labels), ops.zeros_like(weights)

"""Upstream's feed-forward part over chunks of tokens, for NPUs with little memory.

In the backward pass of a recomputed layer, upstream's MLP holds six tensors of S x F: both halves of the projection,
gate, product and two gradients (5 GiB at 32768 tokens and 13696 features in float16). Over chunks, only the halves are
whole. Nothing is computed twice that was not before.

Each chunk adds its weight gradients to the accumulators by itself: where these are float16, more additions round.

Legend: B batch, S tokens of a row, H hidden size, F feed-forward size.
"""

from mindformers.models.glm2.glm2_modules import ChatGLM2MLP, ChatGLM2SwiGLU
from mindspore import ops
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import SiLUGrad, SplitWithSize


def chunk_sizes(length, size):
    """Sizes of the chunks of a row.

    The first is a little longer than the last: weight gradients of equal chunks the compiler joins into one product
    over a copy of all of them (MindSpore's pass AssignAddOpt), and the memory would be back.

    Args:
        length (int): tokens of the row.
        size (int): about how many tokens a chunk has, >= 2.

    Returns:
        tuple[int, ...]: their sum is length.
    """
    count = -(-length // size)
    if count == 1:
        return (length,)
    base = length // count
    more = max(1, base // 256)
    return (base + more,) + (base,) * (count - 2) + (length - more - base * (count - 1),)


class SwiGLU(ChatGLM2SwiGLU):
    """silu(x0) * x1 that keeps its inputs for the backward pass, and computes silu(x0) again there."""

    def __init__(self):
        super().__init__()
        self.silu_grad = SiLUGrad()

    def bprop(self, x0, x1, out, dout):
        # without the dependency the compiler would keep the gate of the forward pass instead
        gate = self.silu(ops.depend(x0, dout))
        return self.silu_grad(dout * x1, x0), dout * gate


class ChunkedMLP(ChatGLM2MLP):
    """Stands where upstream's glm2 has ChatGLM2MLP; without `mlp_chunk_size`, and in prediction, it is upstream's.

    Args:
        config (GLM32KConfig): mlp_chunk_size and the layout: neither tensor nor context parallel.

    Inputs:
        hidden_states (Tensor): (B, S, H).

    Outputs:
        Tensor: (B, S, H).
    """

    def __init__(self, config):
        super().__init__(config)
        self.length = config.seq_length
        self.sizes = chunk_sizes(self.length, config.mlp_chunk_size or self.length)
        if len(self.sizes) > 1:
            rows = ((config.parallel_config.data_parallel, 1, 1),)
            self.activation_func = SwiGLU()
            self.activation_func.shard(rows)
            self.cut = SplitWithSize().shard(rows)
            self.cut.add_prim_attr("skip_redistribution", True)
            self.join = P.Concat(1).shard(rows * len(self.sizes))

    def construct(self, hidden_states):
        if len(self.sizes) == 1 or hidden_states.shape[1] != self.length:
            return super().construct(hidden_states)
        outputs = ()
        for tokens in self.cut(hidden_states, self.sizes, 1):
            outputs += (super().construct(tokens),)
        return self.join(outputs)

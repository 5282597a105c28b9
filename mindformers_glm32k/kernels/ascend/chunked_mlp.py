"""Upstream's feed-forward part over chunks of tokens, for NPUs with little memory.

In the backward pass of a recomputed layer, upstream's MLP holds six tensors of S x F: both halves of the projection,
gate, product and two gradients (5 GiB at 32768 tokens and 13696 features in float16). Over chunks, only the halves are
whole. Nothing is computed twice that was not before.

Each chunk adds its weight gradients to the accumulators by itself: where these are float16, more additions round.

Legend: B batch, S tokens of a sequence, H hidden size, F feed-forward size.
"""

from __future__ import annotations

from mindformers.models.glm2.glm2_modules import ChatGLM2MLP, ChatGLM2SwiGLU
from mindspore import ops
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import SiLUGrad, SplitWithSize

from mindformers_glm32k.config import GLM32KConfig


def chunk_sizes(length: int, size: int) -> tuple[int, ...]:
    """Sizes of the chunks of a sequence of `length` tokens, of about `size` (>= 2) tokens each; their sum is `length`.

    The first is a little longer than the last: weight gradients of equal chunks the compiler joins into one product
    over a copy of all of them (MindSpore's pass AssignAddOpt), and the memory would be back.
    """
    count = -(-length // size)
    if count == 1:
        return (length,)
    base = length // count
    more = max(1, base // 256)
    return (base + more,) + (base,) * (count - 2) + (length - more - base * (count - 1),)


def reads_the_forward(config: GLM32KConfig) -> bool:
    """Whether a hand-written backward pass would keep the forward's tensors: with parts of a layer recomputed
    (`select_recompute`), or without a pipeline, whose micro batches are cells that are called and not inlined.

    The compiler then takes the operators of that backward pass for recomputed ones, and lets them read the forward's
    tensors: both halves of the projection stay (1.7 GiB a layer at 32768 tokens) and are computed again, too.
    """
    parallel = config.parallel_config
    recompute = parallel.recompute
    return parallel.pipeline_stage == 1 or bool(recompute.select_recompute) and not recompute.recompute


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

    (B, S, H) -> (B, S, H), where the layout is neither tensor nor context parallel.
    """

    def __init__(self, config: GLM32KConfig):
        super().__init__(config)
        self.length = config.seq_length
        self.sizes = chunk_sizes(self.length, config.mlp_chunk_size or self.length)
        if len(self.sizes) > 1:
            tokens = ((config.parallel_config.data_parallel, 1, 1),)
            if not reads_the_forward(config):
                self.activation_func = SwiGLU()
            self.activation_func.shard(tokens)
            self.split_tokens = SplitWithSize().shard(tokens)
            self.split_tokens.add_prim_attr("skip_redistribution", True)
            self.join = P.Concat(1).shard(tokens * len(self.sizes))

    def construct(self, hidden_states):
        if len(self.sizes) == 1 or hidden_states.shape[1] != self.length:
            return super().construct(hidden_states)
        outputs = ()
        for chunk in self.split_tokens(hidden_states, self.sizes, 1):
            outputs += (super().construct(chunk),)
        return self.join(outputs)  # (B, S, H)

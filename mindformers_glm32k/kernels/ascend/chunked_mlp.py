"""Upstream's MLP over chunks of tokens, for NPUs with little memory.

In the backward pass of a recomputed layer, upstream's MLP holds six tensors of S x F: both halves of the projection,
gate, product and two gradients (5 GiB at 32768 tokens and 13696 features in float16). Over chunks, only the
two halves exist for all tokens at once, and nothing more is recomputed than before.

Weight gradients are accumulated chunk by chunk: with float16 accumulators that means more rounded additions.

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

    The first is a little longer than the last: MindSpore's pass AssignAddOpt joins the weight gradients of equal chunks
    into one product over a copy of all of them, which would undo the saving.
    """
    count = -(-length // size)
    if count == 1:
        return (length,)
    base = length // count
    more = max(1, base // 256)
    return (base + more,) + (base,) * (count - 2) + (length - more - base * (count - 1),)


def reads_the_forward(config: GLM32KConfig) -> bool:
    """Whether a hand-written backward pass would keep the forward's tensors: with selective recompute
    (`select_recompute`), or without a pipeline, which calls the cells of its micro batches instead of inlining them.

    The compiler then mistakes the operators of that backward pass for recomputed ones, and lets them read the forward's
    tensors: both halves of the projection stay (1.7 GiB a layer at 32768 tokens) although they are recomputed, too.
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
    """Takes the place of glm2's ChatGLM2MLP; without `mlp_chunk_size`, and in prediction, it computes as upstream's.

    (B, S, H) -> (B, S, H), for layouts without tensor and context parallelism.
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

"""Output layer and cross-entropy over chunks of tokens, so that what the loss keeps in float32 is a chunk's.

At 32768 tokens and 65024 words a card's logits take 4.3 GB in float16, and upstream's loss keeps four float32 copies
of them (34 GB). Here the copies are recomputed chunk by chunk in the backward pass. The half-precision logits stay.
Where the output layer itself is not marked for recompute, or a cell around both is, the compiler joins the chunks'
weight gradients into one product over a copy of all their logit gradients: twice the memory (found by the dry run).

On portable cells, where the output layer is a plain one, the chunks are a loop: see looped_loss.py.

Legend: B batch, S tokens of a row, H hidden size.
"""

import copy

from mindformers.core.loss import CrossEntropyLoss
from mindspore import nn, ops

from mindformers_glm32k.kernels.cpu import blocks
from mindformers_glm32k.kernels.cpu.tiled_layers import is_plain
from mindformers_glm32k.kernels.cpu.tiled_loss import LoopedLoss


class ChunkedLoss(nn.Cell):
    """Weighted sum of the token losses, and the sum of the weights.

    Args:
        config (GLM32KConfig): loss_chunk_size and the layout: tokens over dp x cp, vocabulary over mp.

    Inputs:
        output_layer (Cell): hidden states -> logits; an input because a LoRA adapter may take its place, and because
            a cell that holds it would rename its parameter.
        hidden (Tensor): (B, S, H).
        labels (Tensor): (B, S) int32; anything where the weight is 0.
        weights (Tensor): (B, S) float32.
        way (str): what `way` says of the output layer.

    Outputs:
        tuple[Tensor]: sum, count.
    """

    def __init__(self, config):
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
        self.looped, self.looped_frozen = (LoopedLoss(frozen, self.chunk_size) for frozen in (False, True))

    def construct(self, output_layer, hidden, labels, weights, way="chunks"):
        batch, length, width = hidden.shape
        if way != "chunks":
            loop = self.looped_frozen if way == "frozen" else self.looped
            total = loop(
                hidden.reshape((-1, width)), output_layer.weight, labels.reshape((-1,)), weights.reshape((-1,))
            )[0]
            return total, weights.sum()
        # a context parallel rank holds a run of tokens; chunks are cut inside the runs, so that nothing moves
        runs, run_length = batch * self.context, length // self.context
        hidden = hidden.reshape((runs, run_length, width))
        labels = labels.reshape((runs, run_length))
        weights = weights.reshape((runs, run_length))
        total, count = 0.0, 0.0
        for start in range(0, run_length, self.chunk_size):
            stop = min(start + self.chunk_size, run_length)
            tokens = hidden[:, start:stop].reshape((-1, width))
            if start > 0:
                tokens = ops.depend(tokens, total)  # one chunk after the other
            chunk_total, chunk_count = self.loss(
                output_layer(tokens), labels[:, start:stop].reshape((-1,)), weights[:, start:stop].reshape((-1,))
            )
            total, count = total + chunk_total, count + chunk_count
        return total, count

    def way(self, output_layer):
        """str: "chunks" for the unrolled form, which takes any output layer; "loop" or "frozen" (the layer is not
        trained) for the loop."""
        if not self.portable or not blocks.in_graph_mode() or not is_plain(output_layer):
            return "chunks"
        return "loop" if output_layer.weight.requires_grad else "frozen"

"""Sequences split into blocks of tokens, checks of what a loop over blocks supports, and buffers it fills in place.

Legend: B sequences, S tokens of a sequence, N blocks of the batch, C tokens of a block.
"""

from __future__ import annotations

import itertools

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.modules.layers import Linear
from mindspore import GRAPH_MODE, Tensor, get_context, nn, ops
from mindspore.ops import constexpr
from mindspore.ops import operations as P

BLOCK = 512  # tokens; 256 to 1024 differ by a tenth in speed


@constexpr
def arange(count: int) -> Tensor:
    """0, 1, 2, …: (count,) int32, a constant of the program."""
    return Tensor(np.arange(count), mstype.int32)


@constexpr(reuse_result=False)
def in_graph_mode() -> bool:
    """Whether the loops can be used: PyNative mode loses what a custom backward pass writes in place."""
    return get_context("mode") == GRAPH_MODE


def is_plain(cell: nn.Cell) -> bool:
    """Whether a loop can take the cell's weight: upstream's Linear without bias or activation, and no adapter."""
    return type(cell) is Linear and not cell.has_bias and not cell.activation_flag and not cell.expert_flag


def tiling_mode(*cells: nn.Cell) -> str:
    """How a loop treats the cells' weights: "tiled", or "frozen" where none of them is trained."""
    trained = any(parameter.requires_grad for cell in cells for parameter in cell.get_parameters())
    return "tiled" if trained else "frozen"


def block_count(length: int, largest: int = BLOCK) -> tuple[int, int]:
    """(number of blocks in a sequence of `length` tokens, C): C at most `largest`, with the least padding."""
    count = -(-length // largest)
    return count, -(-length // count)


def split_into_blocks(x: Tensor, largest: int = BLOCK) -> Tensor:
    """(B, S, …) -> (N, C, …); a sequence that is no multiple of C is padded with zeros at its end."""
    batch, length = x.shape[:2]
    rest = x.shape[2:]
    count, size = block_count(length, largest)
    if count * size > length:
        x = ops.cat((x, ops.zeros((batch, count * size - length) + rest, x.dtype)), 1)
    return x.reshape((batch * count, size) + rest)  # (N, C, …)


def join_blocks(blocks: Tensor, batch: int, length: int) -> Tensor:
    """(N, C, …) -> (B, S, …) without the padding of `split_into_blocks`."""
    rest = blocks.shape[2:]
    count = blocks.shape[0] // batch
    return blocks.reshape((batch, count * blocks.shape[1]) + rest)[:, :length]


def _in_place(name):
    """The primitive without its check that the first input is a Parameter: the kernel writes into that input's memory.

    Its return value is not used: the buffer itself is passed on, tied to the write by `depend`.
    """
    primitive = ops.Primitive(name)
    primitive.init_prim_io_names(inputs=["input_x", "indices", "updates"], outputs=["y"])
    primitive.add_prim_attr("use_locking", False)
    return primitive


class Buffer(nn.Cell):
    """A tensor of N blocks that a loop writes one by one, without copying the whole in every step.

    It lives for one call and is no Parameter: it is not in checkpoints, and each call chooses its shape.
    The kernels ScatterUpdate and ScatterAdd write in place on every host (MindSpore 2.7.0 to 2.9.0);
    TensorScatterUpdate would copy the buffer in every step.

    The compiler merges equal expressions, and buffers that share memory would overwrite each other: each has an id.
    """

    _ids = itertools.count()

    def __init__(self):
        super().__init__()
        # x < x is always false: zeros that are not folded into a constant, which would keep what earlier calls wrote.
        self.nothing = P.Less()
        self.nothing.add_prim_attr("buffer", next(Buffer._ids))
        self.update = _in_place("ScatterUpdate")
        self.accumulate = _in_place("ScatterAdd")

    def construct(self, source, shape, dtype):
        """Zeros of `shape` (N, …); `source` is any tensor of the call that is not a constant."""
        first = source.reshape((-1,))[:1]
        zero = ops.cast(self.nothing(first, first), dtype)
        return ops.broadcast_to(zero.reshape((1,) * len(shape)), shape)

    def put(self, buffer: Tensor, index: Tensor, block: Tensor) -> Tensor:
        """The buffer with the block at `index`, a () int32 tensor, replaced."""
        return ops.depend(buffer, self.update(buffer, index.reshape((1,)), block.reshape((1,) + block.shape)))

    def add(self, buffer: Tensor, index: Tensor, block: Tensor) -> Tensor:
        """The buffer with `block` added at `index`."""
        return ops.depend(buffer, self.accumulate(buffer, index.reshape((1,)), block.reshape((1,) + block.shape)))

"""Rows cut into blocks of tokens, and buffers that loops over blocks fill in place.

Legend: B rows, S tokens of a row, N blocks of the batch, C tokens of a block.
"""

import itertools

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import GRAPH_MODE, Tensor, get_context, nn, ops
from mindspore.ops import constexpr
from mindspore.ops import operations as P

BLOCK = 512  # tokens; 256 to 1024 differ by a tenth in speed


@constexpr
def numbers(count):
    """Tensor: (count,) int32, 0, 1, 2, …, a constant of the program."""
    return Tensor(np.arange(count), mstype.int32)


@constexpr(reuse_result=False)
def in_graph_mode():
    """bool: whether the loops can be used: PyNative mode loses what a custom backward pass writes in place."""
    return get_context("mode") == GRAPH_MODE


def block_count(length, largest=BLOCK):
    """Blocks of a row, and tokens of a block, so that a row is filled up by as few tokens as possible.

    Args:
        length (int): S.
        largest (int): the largest block.

    Returns:
        tuple[int, int]: blocks of a row, C.
    """
    count = -(-length // largest)
    return count, -(-length // count)


def cut(x, largest=BLOCK):
    """(B, S, …) -> (N, C, …); rows that are no multiple of C are filled up with zeros at their end."""
    batch, length = x.shape[:2]
    rest = x.shape[2:]
    count, size = block_count(length, largest)
    if count * size > length:
        x = ops.cat((x, ops.zeros((batch, count * size - length) + rest, x.dtype)), 1)
    return x.reshape((batch * count, size) + rest)


def joined(blocks, batch, length):
    """(N, C, …) -> (B, S, …), what `cut` filled up is left out."""
    rest = blocks.shape[2:]
    count = blocks.shape[0] // batch
    return blocks.reshape((batch, count * blocks.shape[1]) + rest)[:, :length]


def _in_place(name):
    """The primitive without its demand for a Parameter: the kernel writes into the memory of its first input.

    What the primitive returns is not used: the buffer itself is passed on, tied to the write by `depend`.
    """
    primitive = ops.Primitive(name)
    primitive.init_prim_io_names(inputs=["input_x", "indices", "updates"], outputs=["y"])
    primitive.add_prim_attr("use_locking", False)
    return primitive


class Buffer(nn.Cell):
    """A tensor of the blocks that a loop writes one by one, without a copy of the whole per step.

    It belongs to one call and is no Parameter: nothing of it is in checkpoints, and its shape is that of the call.
    The kernels ScatterUpdate and ScatterAdd write in place on every host (MindSpore 2.7.0 to 2.9.0);
    TensorScatterUpdate would copy the buffer in every step.

    The compiler joins equal expressions, and two buffers of one memory would overwrite each other: each has a number.
    """

    _number = itertools.count()

    def __init__(self):
        super().__init__()
        # Nothing is less than itself: zeros that are not folded into a constant, which would keep what is written.
        self.nothing = P.Less()
        self.nothing.add_prim_attr("buffer", next(Buffer._number))
        self.update = _in_place("ScatterUpdate")
        self.accumulate = _in_place("ScatterAdd")

    def construct(self, source, shape, dtype):
        """Zeros.

        Args:
            source (Tensor): any tensor of the call that is not a constant.
            shape (tuple[int]): (N, …).
            dtype: of the zeros.

        Returns:
            Tensor
        """
        first = source.reshape((-1,))[:1]
        zero = ops.cast(self.nothing(first, first), dtype)
        return ops.broadcast_to(zero.reshape((1,) * len(shape)), shape)

    def put(self, buffer, index, block):
        """The buffer with block number `index`, a () int32 tensor, replaced."""
        return ops.depend(buffer, self.update(buffer, index.reshape((1,)), block.reshape((1,) + block.shape)))

    def add(self, buffer, index, block):
        """The buffer with `block` added to block number `index`."""
        return ops.depend(buffer, self.accumulate(buffer, index.reshape((1,)), block.reshape((1,) + block.shape)))

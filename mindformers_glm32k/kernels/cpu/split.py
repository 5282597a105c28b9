"""Splitting the last axis by slices, where upstream uses the NPU kernel SplitWithSize."""

from mindspore import nn


class SplitLastAxis(nn.Cell):
    """Cuts the last axis into pieces.

    Inputs:
        x (Tensor): (batch, seq, sum(sizes)).
        sizes (tuple[int]): the pieces' widths.
        axis (int): 2, as upstream calls it.

    Outputs:
        tuple[Tensor]: one (batch, seq, size) per size.
    """

    def construct(self, x, sizes, axis):
        pieces = ()
        start = 0
        for size in sizes:
            pieces += (x[..., start : start + size],)
            start += size
        return pieces

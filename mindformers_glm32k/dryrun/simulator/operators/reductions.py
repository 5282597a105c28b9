"""Reductions: float32 sums for fp16, rounded once, as MindSpore's kernels do.

`axis` is an int, a tuple or None; None and () reduce all axes.
"""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import operator
from mindformers_glm32k.dryrun.simulator.operators.numeric import as_output, axes, refuse, wide


@operator("ReduceSum")
def reduce_sum(call, x, axis=None, keep_dims=False, skip_mode=False):
    """Sum over axis. skip_mode (an empty axis reduces nothing) is not implemented. Source: mindspore.ops.ReduceSum."""
    refuse(call, skip_mode=(bool(skip_mode), False))
    return _reduce(call, np.sum, x, axis, keep_dims)


@operator("SumExt")
def sum_ext(call, x, axis=None, keep_dims=False, dtype=None):
    """Sum over axis, of dtype (MindSpore's number; the compiled result names it). Source: mindspore.mint.sum."""
    return _reduce(call, np.sum, x, axis, keep_dims)


@operator("ReduceMean")
def reduce_mean(call, x, axis=None, keep_dims=False):
    """Mean over axis."""
    return _reduce(call, np.mean, x, axis, keep_dims)


@operator("ReduceMax")
def reduce_max(call, x, axis=None, keep_dims=False):
    """Largest over axis; NaN where one is."""
    return _reduce(call, np.max, x, axis, keep_dims)


@operator("ReduceMin")
def reduce_min(call, x, axis=None, keep_dims=False):
    """Smallest over axis; NaN where one is."""
    return _reduce(call, np.min, x, axis, keep_dims)


@operator("ReduceAll")
def reduce_all(call, x, axis=None, keep_dims=False):
    """bool: all over axis."""
    return _reduce(call, np.all, x, axis, keep_dims)


@operator("ReduceAny")
def reduce_any(call, x, axis=None, keep_dims=False):
    """bool: any over axis."""
    return _reduce(call, np.any, x, axis, keep_dims)


@operator("CumSum")
def cum_sum(call, x, axis, exclusive=False, reverse=False):
    """Sums up to and with each element along `axis`; exclusive: without it, reverse: from the end.

    Source: mindspore.ops.CumSum.
    """
    axis = int(axis)
    values = np.flip(wide(x), axis) if reverse else wide(x)
    sums = np.cumsum(values, axis, dtype=values.dtype)
    if exclusive:
        sums = sums - values
    return as_output(np.flip(sums, axis) if reverse else sums, call.output)


def _reduce(call, function, x, axis, keep_dims):
    return as_output(function(wide(x), axis=axes(axis, x.ndim), keepdims=bool(keep_dims)), call.output)

"""What sums along axes: matrix products, reductions, norms and softmax. float32 sums for fp16, rounded once.

`axis` of a reduction is an int, a tuple or None; None and () reduce all axes.
"""

from __future__ import annotations

from typing import Union

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import Array, Call, as_output, operator, wide

Axis = Union[int, tuple[int, ...], None]


@operator("MatMul")
def matmul(call: Call, x: Array, y: Array, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    """x (m, k) @ y (k, n) -> (m, n); x is (k, m) with transpose_a, y (n, k) with transpose_b.

    Source: mindspore.ops.MatMul.
    """
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"MatMul takes matrices, not {x.shape} and {y.shape}")
    return batch_matmul(call, x, y, transpose_a, transpose_b)


@operator("BatchMatMul", "MatMulExt", "BatchMatMulExt")
def batch_matmul(call: Call, x: Array, y: Array, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    """x (…, m, k) @ y (…, k, n) -> (…, m, n), leading axes broadcast. Source: mindspore.ops.BatchMatMul."""
    x = np.swapaxes(x, -1, -2) if transpose_a else x
    y = np.swapaxes(y, -1, -2) if transpose_b else y
    return as_output(np.matmul(wide(x), wide(y)), call.output)


@operator("BiasAdd")
def bias_add(call: Call, x: Array, bias: Array) -> Array:
    """x (n, c) or (n, c, …) + bias (c), in the layout NCHW."""
    return as_output(x + bias.reshape((-1,) + (1,) * (x.ndim - 2)), call.output)


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes of a reduction, not negative."""
    if axis is None or axis == ():
        return tuple(range(ndim))
    return tuple(int(item) % ndim for item in (axis if isinstance(axis, tuple) else (axis,)))


def _reduction(function):
    def compute(call, x, axis=None, keep_dims=False):
        """function(x) over axis: NumPy's of that name; max and min are NaN where an element is."""
        return as_output(function(wide(x), axis=_axes(axis, x.ndim), keepdims=bool(keep_dims)), call.output)

    return compute


_REDUCTIONS = {
    "ReduceMean": np.mean,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceAll": np.all,
    "ReduceAny": np.any,
}
for _name, _function in _REDUCTIONS.items():
    operator(_name)(_reduction(_function))
_sum = _reduction(np.sum)


@operator("ReduceSum")
def reduce_sum(call: Call, x: Array, axis: Axis = None, keep_dims: bool = False, skip_mode: bool = False) -> Array:
    """Sum over axis. skip_mode (an empty axis reduces nothing) is not implemented. Source: mindspore.ops.ReduceSum."""
    call.require(False, skip_mode=bool(skip_mode))
    return _sum(call, x, axis, keep_dims)


@operator("SumExt")
def sum_ext(call: Call, x: Array, axis: Axis = None, keep_dims: bool = False, dtype: int | None = None) -> Array:
    """Sum over axis, of dtype (MindSpore's enum; the compiled result names it). Source: mindspore.mint.sum."""
    return _sum(call, x, axis, keep_dims)


@operator("CumSum")
def cum_sum(call: Call, x: Array, axis: int, exclusive: bool = False, reverse: bool = False) -> Array:
    """Sums up to and with each element along `axis`; exclusive: without it, reverse: from the end.

    Source: mindspore.ops.CumSum.
    """
    axis = int(axis)
    values = np.flip(wide(x), axis) if reverse else wide(x)
    sums = np.cumsum(values, axis, dtype=values.dtype)
    if exclusive:
        sums = sums - values
    return as_output(np.flip(sums, axis) if reverse else sums, call.output)


@operator("RmsNorm")
def rms_norm(call: Call, x: Array, gamma: Array, epsilon: float) -> tuple[Array, Array]:
    """y = x * rstd * gamma with rstd = 1 / sqrt(mean(x², last axes) + epsilon), over as many axes as gamma has.

    x (…, d), gamma (d) -> y (…, d), rstd (…, 1) in float32. Source: mindspore.ops.RmsNorm.
    """
    normed = tuple(range(-gamma.ndim, 0))
    x = wide(x)
    rstd = 1 / np.sqrt(np.mean(np.square(x), axis=normed, keepdims=True) + x.dtype.type(epsilon))
    return as_output(x * rstd * wide(gamma), call.output[0]), as_output(rstd, call.output[1])


@operator("RmsNormGrad")
def rms_norm_grad(call: Call, dy: Array, x: Array, rstd: Array, gamma: Array) -> tuple[Array, Array]:
    """dy (…, d), x (…, d), rstd (…, 1), gamma (d) -> dx (…, d), dgamma (d).

    With g = dy * gamma and n = x * rstd: dx = rstd * (g - n * mean(g * n)), dgamma = sum(dy * n).
    Source: the derivative of the formula of `rms_norm`.
    """
    normed = tuple(range(-gamma.ndim, 0))
    dy, x, gamma = wide(dy), wide(x), wide(gamma)
    n, g = x * rstd, dy * gamma
    dx = rstd * (g - n * np.mean(g * n, axis=normed, keepdims=True))
    dgamma = np.sum(dy * n, axis=tuple(range(x.ndim - gamma.ndim)))
    return as_output(dx, call.output[0]), as_output(dgamma, call.output[1])


@operator("Softmax")
def softmax(call: Call, x: Array, axis: Axis) -> Array:
    """exp(x) / sum(exp(x)) over `axis` (int or a tuple of one). Source: mindspore.ops.softmax."""
    axis = _axes(axis, x.ndim)
    x = wide(x)
    weights = np.exp(x - x.max(axis, keepdims=True))
    return as_output(weights / weights.sum(axis, keepdims=True), call.output)


@operator("LogSoftmax")
def log_softmax(call: Call, x: Array, axis: Axis) -> Array:
    """log(softmax(x)) over `axis`. Source: mindspore.ops.log_softmax."""
    axis = _axes(axis, x.ndim)
    x = wide(x)
    x = x - x.max(axis, keepdims=True)
    return as_output(x - np.log(np.exp(x).sum(axis, keepdims=True)), call.output)


@operator("SoftmaxBackward")
def softmax_backward(call: Call, dy: Array, y: Array, axis: Axis) -> Array:
    """Gradient of softmax, from its result y: y * (dy - sum(dy * y))."""
    dy, y = wide(dy), wide(y)
    return as_output(y * (dy - np.sum(dy * y, _axes(axis, y.ndim), keepdims=True)), call.output)

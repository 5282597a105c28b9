"""RmsNorm, softmax, and their gradients: float32 for fp16, rounded once."""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import operator
from mindformers_glm32k.dryrun.simulator.operators.numeric import as_output, axes, wide


@operator("RmsNorm")
def rms_norm(call, x, gamma, epsilon):
    """y = x * rstd * gamma with rstd = 1 / sqrt(mean(x², last axes) + epsilon), over as many axes as gamma has.

    x (…, d), gamma (d) -> y (…, d), rstd (…, 1) in float32. Source: mindspore.ops.RmsNorm.
    """
    normed = tuple(range(-gamma.ndim, 0))
    x = wide(x)
    rstd = 1 / np.sqrt(np.mean(np.square(x), axis=normed, keepdims=True) + x.dtype.type(epsilon))
    return as_output(x * rstd * wide(gamma), call.output[0]), as_output(rstd, call.output[1])


@operator("RmsNormGrad")
def rms_norm_grad(call, dy, x, rstd, gamma):
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
def softmax(call, x, axis):
    """exp(x) / sum(exp(x)) over `axis` (int or a tuple of one). Source: mindspore.ops.softmax."""
    axis = axes(axis, x.ndim)
    x = wide(x)
    weights = np.exp(x - x.max(axis, keepdims=True))
    return as_output(weights / weights.sum(axis, keepdims=True), call.output)


@operator("SoftmaxBackward")
def softmax_backward(call, dy, y, axis):
    """Gradient of softmax, from its result y: y * (dy - sum(dy * y))."""
    dy, y = wide(dy), wide(y)
    return as_output(y * (dy - np.sum(dy * y, axes(axis, y.ndim), keepdims=True)), call.output)

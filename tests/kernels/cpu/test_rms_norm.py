"""RMSNorm against its formula in float64, forward and gradients."""

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
import pytest

from mindformers_glm32k.kernels.cpu.rms_norm import RMSNorm

EPS = 1e-5


def reference(x, weight, upstream_gradient):
    """Value, gradient of x and gradient of the weight, in float64."""
    x, weight, gradient = (np.asarray(value, np.float64) for value in (x, weight, upstream_gradient))
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    unit = x * inverse
    scaled = gradient * weight
    x_gradient = inverse * (scaled - unit * (scaled * unit).mean(-1, keepdims=True))
    return unit * weight, x_gradient, (gradient * unit).reshape(-1, x.shape[-1]).sum(0)


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 17, 64), (3, 5, 127)])
@pytest.mark.parametrize("dtype, tolerance", [(mstype.float32, 2e-6), (mstype.float16, 2e-3)])
def test_forward_and_gradients(shape, dtype, tolerance):
    random = np.random.default_rng(0)
    x, gradient = random.normal(size=(2,) + shape)
    weight = random.normal(size=shape[-1:])
    cell = RMSNorm(shape[-1], EPS)
    cell.weight.set_data(ms.Tensor(weight, mstype.float32))
    x, gradient = ms.Tensor(x, dtype), ms.Tensor(gradient, dtype)
    value = cell(x)
    x_gradient, (weight_gradient,) = ms.ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)(
        cell, [cell.weight]
    )(x, gradient)
    expected = reference(x.asnumpy(), cell.weight.asnumpy(), gradient.asnumpy())
    assert value.dtype == dtype
    for ours, theirs in zip((value, x_gradient[0], weight_gradient), expected):
        np.testing.assert_allclose(ours.asnumpy(), theirs, rtol=tolerance, atol=tolerance * 10)


def test_constant_rows_stay_finite():
    assert np.isfinite(RMSNorm(8, EPS)(ms.Tensor(np.zeros((1, 2, 8), np.float32))).asnumpy()).all()

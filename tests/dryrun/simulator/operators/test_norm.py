"""RmsNorm by its published formula, softmax by MindSpore's CPU kernel and SciPy, gradients by central differences."""

import numpy as np
import pytest
from scipy import special

from dryrun.simulator.operators.calling import call, covers, numeric_gradient, random, tolerance
from dryrun.simulator.operators.mindspore_cpu import run

FLOATS = ("float32", "float16", "bfloat16")
EPSILON = 1e-5


def norm(x, gamma):
    """Zhang and Sennrich (arXiv:1910.07467), equation 4, with epsilon under the root."""
    root = np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + EPSILON)
    return x / root * gamma, 1 / root


@covers("RmsNorm")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 16), (1, 1, 1)])
def test_rms_norm(shape, dtype):
    x, gamma = random(shape, dtype), random(shape[-1:], dtype, 1)
    y, rstd = call("RmsNorm", x, gamma, EPSILON, to=(dtype, "float32"))
    expected = norm(x, gamma.astype(np.float64))
    np.testing.assert_allclose(y, expected[0], **tolerance(dtype))
    np.testing.assert_allclose(rstd, expected[1], rtol=1e-6)
    assert y.shape == shape and rstd.shape == (*shape[:-1], 1)


@covers("RmsNorm")
def test_squares_of_half_precision_do_not_overflow():
    x = np.full((1, 4), 1000, np.float16)
    y, rstd = call("RmsNorm", x, np.ones(4, np.float16), EPSILON, to=("float16", "float32"))
    assert (y == 1).all() and rstd == np.float32(1e-3)


@covers("RmsNormGrad")
@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 4)])
def test_rms_norm_grad(shape):
    x, gamma, dy = random(shape, "float64"), random(shape[-1:], "float64", 1), random(shape, "float64", 2)

    def forward(*inputs):
        return call("RmsNorm", *inputs, EPSILON, to=("float64", "float64"))[0]

    rstd = norm(x, gamma)[1]
    expected = [numeric_gradient(forward, [x, gamma], dy, index) for index in range(2)]
    for actual, wanted in zip(call("RmsNormGrad", dy, x, rstd, gamma, to=("float64", "float64")), expected):
        np.testing.assert_allclose(actual, wanted, rtol=1e-7, atol=1e-9)
    for dtype in FLOATS:
        narrow = [call("Cast", item, to=dtype) for item in (dy, x, gamma)]
        results = call("RmsNormGrad", *narrow[:2], rstd.astype(np.float32), narrow[2], to=(dtype, "float32"))
        for actual, wanted in zip(results, expected):
            np.testing.assert_allclose(
                actual, wanted, rtol=0, atol={"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}[dtype]
            )


@covers("Softmax")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_softmax(axis, dtype):
    from mindspore import ops

    x = random((3, 4, 5), dtype, scale=3.0)
    expected = run(lambda tensor: ops.softmax(tensor, axis), x.astype(np.float32), dtype=dtype)
    for given in (axis, (axis,)):
        np.testing.assert_allclose(call("Softmax", x, given, to=dtype), expected, **tolerance(dtype))
    x = x.astype(np.float64)
    np.testing.assert_allclose(call("Softmax", x, axis, to="float64"), special.softmax(x, axis))


@covers("SoftmaxBackward")
@pytest.mark.parametrize("axis", [-1, 1])
def test_softmax_backward(axis):
    x, dy = random((2, 3, 5), "float64"), random((2, 3, 5), "float64", 1)
    expected = numeric_gradient(lambda value: special.softmax(value, axis), [x], dy, 0)
    y = special.softmax(x, axis)
    np.testing.assert_allclose(call("SoftmaxBackward", dy, y, axis, to="float64"), expected, atol=1e-9)
    for dtype in FLOATS:
        narrow = [call("Cast", item, to=dtype) for item in (dy, y)]
        np.testing.assert_allclose(
            call("SoftmaxBackward", *narrow, axis, to=dtype),
            expected,
            rtol=0,
            atol={"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype],
        )

"""Products and reductions against MindSpore's CPU kernels, RmsNorm by its published formula, softmax by SciPy too,
gradients by central differences."""

import numpy as np
import pytest
from scipy import special

from dryrun.simulator.operators.calling import call, covers, numeric_gradient, random, tolerance
from dryrun.simulator.operators.mindspore_cpu import run

FLOATS = ("float32", "float16", "bfloat16")


def product(name, transpose_a, transpose_b):
    from mindspore.ops import operations

    return getattr(operations, name)(transpose_a, transpose_b)


@covers("MatMul")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transpose_a", [0, 1])
@pytest.mark.parametrize("transpose_b", [0, 1])
def test_matmul(transpose_a, transpose_b, dtype):
    x, y = random((5, 7)[:: -1 if transpose_a else 1], dtype), random((7, 3)[:: -1 if transpose_b else 1], dtype, 1)
    expected = run(
        product("MatMul", bool(transpose_a), bool(transpose_b)), x.astype(np.float32), y.astype(np.float32), dtype=dtype
    )
    np.testing.assert_allclose(call("MatMul", x, y, transpose_a, transpose_b, to=dtype), expected, **tolerance(dtype))


@covers("MatMul")
def test_matmul_takes_matrices_only():
    with pytest.raises(ValueError, match=r"takes matrices, not \(2, 3, 4\)"):
        call("MatMul", random((2, 3, 4)), random((4, 2)))


@covers("MatMul")
def test_sums_are_float32():
    x = np.full((1, 4096), 1, np.float16)  # in float16 the sum would stop at 2048
    assert call("MatMul", x, x, 0, 1, to="float16") == 4096
    large = np.full((1, 4), 256, np.float16)
    assert np.isinf(call("MatMul", large, large, 0, 1, to="float16")).all()  # 262144 is no float16


@covers("BatchMatMul", "BatchMatMulExt", "MatMulExt")
@pytest.mark.parametrize("name", ["BatchMatMul", "BatchMatMulExt", "MatMulExt"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_matmul(name, dtype):
    x, y = random((2, 3, 5, 7), dtype), random((2, 3, 7, 4), dtype, 1)
    expected = run(product("BatchMatMul", False, False), x.astype(np.float32), y.astype(np.float32), dtype=dtype)
    np.testing.assert_allclose(call(name, x, y, to=dtype), expected, **tolerance(dtype))


@covers("BatchMatMul")
def test_batch_matmul_transposed_and_broadcast():
    x, y = random((2, 3, 5, 7)), random((4, 7), seed=1)
    from mindspore import ops

    expected = run(ops.matmul, x, np.ascontiguousarray(y.T))
    np.testing.assert_allclose(call("BatchMatMul", x, y, 0, 1), expected, **tolerance("float32"))
    x, y = random((2, 3, 7, 5), seed=2), random((2, 3, 4, 7), seed=3)
    expected = run(product("BatchMatMul", True, True), x, y)
    np.testing.assert_allclose(call("BatchMatMul", x, y, 1, 1), expected, **tolerance("float32"))


@covers("BiasAdd")
@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 7)])
def test_bias_add(shape):
    from mindspore.ops import operations

    x, bias = random(shape), random((5,), seed=1)
    np.testing.assert_array_equal(call("BiasAdd", x, bias), run(operations.BiasAdd(), x, bias))


AXES = [None, (), 0, (-1,), (0, 2)]
SUMS = {
    "ReduceSum": "ReduceSum",
    "SumExt": "ReduceSum",
    "ReduceMean": "ReduceMean",
    "ReduceMax": "ReduceMax",
    "ReduceMin": "ReduceMin",
}


def primitive(name, keep_dims):
    from mindspore.ops import operations

    return getattr(operations, name)(keep_dims)


@covers(*SUMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("keep_dims", [0, 1])
@pytest.mark.parametrize("name", SUMS)
def test_reductions(name, keep_dims, axis, dtype):
    x = random((3, 5, 7), dtype)
    expected = run(
        primitive(SUMS[name], bool(keep_dims)), x.astype(np.float32), () if axis is None else axis, dtype=dtype
    )
    actual = call(name, x, axis, keep_dims, to=dtype)
    np.testing.assert_allclose(actual, expected, rtol=tolerance(dtype)["rtol"], atol=1e-5)


@covers("ReduceAll", "ReduceAny")
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["ReduceAll", "ReduceAny"])
def test_logic(name, axis):
    x = random((3, 2, 3)) > (-1 if name == "ReduceAll" else 1)
    expected = run(primitive(name, False), x, () if axis is None else axis)
    np.testing.assert_array_equal(call(name, x, axis, 0, to="bool"), expected)


@covers("SumExt", "ReduceSum")
def test_sums_of_half_precision_are_float32():
    ones = np.ones(5000, np.float16)  # one by one in float16 the sum would stop at 2048
    for name in ("SumExt", "ReduceSum"):
        assert call(name, ones, None, 0, to="float16") == 5000
    assert np.isinf(call("SumExt", ones * np.float16(100), None, 0, None, to="float16"))


@covers("SumExt")
def test_sum_of_integers_in_the_compiled_dtype():
    assert call("SumExt", np.array([2**31 - 1, 1], np.int32), None, 0, None, to="int64") == 2**31


@covers("ReduceSum")
def test_skip_mode_is_refused():
    assert call("ReduceSum", random((3,)), None, 0, 0).shape == ()
    with pytest.raises(NotImplementedError, match="skip_mode"):
        call("ReduceSum", random((3,)), None, 0, 1)


@covers("CumSum")
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_cumulative_sum(dtype, reverse, exclusive):
    from mindspore.ops import operations

    x = (random((3, 5)) * 8).astype(dtype)
    for axis in (0, 1):
        expected = run(operations.CumSum(bool(exclusive), bool(reverse)), x, axis)
        actual = call("CumSum", x, axis, exclusive, reverse, to=dtype)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


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


@covers("LogSoftmax")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_log_softmax(axis, dtype):
    from mindspore import ops

    x = random((3, 4, 5), dtype, scale=3.0)
    expected = run(lambda tensor: ops.log_softmax(tensor, axis), x.astype(np.float32), dtype=dtype)
    allowed = {**tolerance(dtype), **({"atol": 1e-5} if dtype == "float32" else {})}  # MindSpore's logarithm is rough
    np.testing.assert_allclose(call("LogSoftmax", x, axis, to=dtype), expected, **allowed)
    x = x.astype(np.float64)
    np.testing.assert_allclose(call("LogSoftmax", x, axis, to="float64"), special.log_softmax(x, axis))


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

"""Matrix products against MindSpore's CPU kernels."""

import numpy as np
import pytest

from dryrun.simulator.operators.calling import call, covers, random, tolerance
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

"""Reductions against MindSpore's CPU kernels."""

import numpy as np
import pytest

from dryrun.simulator.operators.calling import call, covers, random, tolerance
from dryrun.simulator.operators.mindspore_cpu import run

FLOATS = ("float32", "float16", "bfloat16")
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
        expected = run(lambda tensor: operations.CumSum(bool(exclusive), bool(reverse))(tensor, axis), x)
        actual = call("CumSum", x, axis, exclusive, reverse, to=dtype)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

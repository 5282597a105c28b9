"""What moves elements, against MindSpore's CPU kernels: equal in every element."""

import numpy as np
import pytest

from dryrun.simulator.operators.calling import call, covers, random
from dryrun.simulator.operators.mindspore_cpu import run

X = random((2, 3, 4))


def primitive(name, *arguments):
    from mindspore.ops import operations

    return getattr(operations, name)(*arguments)


def same(actual, expected):
    if isinstance(expected, tuple):
        assert isinstance(actual, tuple) and len(actual) == len(expected)
        for pair in zip(actual, expected):
            same(*pair)
        return
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == expected.dtype


@covers("Reshape")
@pytest.mark.parametrize("shape", [(6, 4), (-1, 2), (2, 1, -1), (24,)])
def test_reshape(shape):
    same(call("Reshape", X, shape), run(primitive("Reshape"), X, shape))


@covers("Reshape")
def test_reshape_to_a_scalar():
    assert call("Reshape", np.array([3.0], np.float32), None).shape == ()


@covers("Transpose")
@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 0, 1), (0, 1, 2)])
def test_transpose(axes):
    same(call("Transpose", X, axes), run(primitive("Transpose"), X, axes))


@covers("ExpandDims", "Squeeze")
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_axes_of_one(axis):
    wider = run(primitive("ExpandDims"), X, axis)
    same(call("ExpandDims", X, axis), wider)
    same(call("Squeeze", wider, axis=axis), run(primitive("Squeeze", axis), wider))
    same(call("Squeeze", wider, axis=None), run(primitive("Squeeze"), wider))


@covers("Concat")
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis):
    parts = tuple(np.moveaxis(random((length, 3, 4), seed=length), 0, axis).copy() for length in (1, 5, 2))
    same(call("Concat", parts, axis), run(primitive("Concat", axis), parts))


@covers("Stack", "Unstack")
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stack_and_back(axis):
    parts = (X, X + 1, X * 2)
    stacked = run(primitive("Stack", axis), parts)
    same(call("Stack", parts, axis=axis), stacked)
    same(call("Unstack", stacked, to=("float32",) * 3, axis=axis), run(primitive("Unstack", axis), stacked))


@covers("Stack", "Unstack")
def test_stack_never_guesses_its_axis():
    for name, value in (("Stack", (X, X)), ("Unstack", X)):
        with pytest.raises(KeyError, match=f"{name} has no attribute 'axis'"):
            call(name, value, num=2)


@covers("Split")
@pytest.mark.parametrize("axis, number", [(0, 2), (1, 3), (-1, 2)])
def test_split(axis, number):
    same(call("Split", X, axis, number, to=("float32",) * number), run(primitive("Split", axis, number), X))


@covers("SplitWithSize")
def test_split_with_size():
    from mindspore import ops

    x = random((1, 5, 8))
    same(call("SplitWithSize", x, (5, 1, 2), 2, to=("float32",) * 3), run(ops.split, x, (5, 1, 2), 2))
    with pytest.raises(ValueError, match="sizes"):
        call("SplitWithSize", x, (5, 1, 1), 2, to=("float32",) * 3)


@covers("Tile")
@pytest.mark.parametrize("multiples", [(1, 2, 3), (2, 1, 1, 2)])
def test_tile(multiples):
    same(call("Tile", X, multiples), run(primitive("Tile"), X, multiples))


@covers("BroadcastTo")
@pytest.mark.parametrize("shape", [(2, 3, 4), (5, -1, 3, 4)])
def test_broadcast_to(shape):
    x = random((2, 1, 4))
    shape = shape if len(shape) == 3 else (5, 2, 3, 4)
    same(call("BroadcastTo", x, shape), run(primitive("BroadcastTo", shape), x))
    same(call("BroadcastTo", x, (2, 3, -1)), run(primitive("BroadcastTo", (2, 3, -1)), x))


@covers("TensorMove", "ZerosLike", "OnesLike")
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
def test_copies_and_constants(dtype):
    x = (X * 3).astype(dtype)
    moved = call("TensorMove", x, to=dtype)
    assert not np.shares_memory(moved, x)
    same(moved, x)
    for name in ("ZerosLike", "OnesLike"):
        same(call(name, x, to=dtype), run(primitive(name), x))


@covers("TensorToTuple")
def test_tensor_to_tuple():
    from dryrun.simulator.operators import calling

    entry = calling.table()["TensorToTuple"]
    calling._called.add("TensorToTuple")
    result = entry.function(None, np.array([3, 5], np.int64))
    assert result == (3, 5) and all(type(item) is int for item in result)

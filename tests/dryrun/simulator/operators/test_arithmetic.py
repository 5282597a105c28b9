"""Element-wise operators against MindSpore's CPU kernels."""

import numpy as np
import pytest

from dryrun.simulator.operators.calling import call, covers, numeric_gradient, random, tolerance
from dryrun.simulator.operators.mindspore_cpu import run

FLOATS = ("float32", "float16", "bfloat16")
# odd, broadcast, scalar
SHAPES = [((3, 5), (3, 5)), ((2, 1, 7), (4, 1)), ((5,), ()), ((), ())]
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "RealDiv", "Maximum", "Minimum", "FloorDiv", "FloorMod")
COMPARISON = ("Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual")
SCALAR = {"Adds": "Add", "Subs": "Sub", "Muls": "Mul", "Divs": "Div"}
UNARY = ("Neg", "Abs", "Square", "Sqrt", "Exp", "Sin", "Cos", "Tanh", "Reciprocal", "Rsqrt")


def primitive(name):
    from mindspore.ops import operations

    return getattr(operations, name)()


@covers(*ARITHMETIC)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, shapes, dtype):
    x, y = (random(shape, dtype, seed) for seed, shape in enumerate(shapes))
    expected = run(primitive(name), x, y, dtype=dtype)
    np.testing.assert_allclose(call(name, x, y, to=dtype), expected, **tolerance(dtype))


@covers("Add", "Sub", "Mul", "Maximum", "Minimum", "FloorDiv", "FloorMod", "Equal", "Less")
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("name", ["Add", "Sub", "Mul", "Maximum", "Minimum", "FloorDiv", "FloorMod", "Equal", "Less"])
def test_integers(name, dtype):
    x = np.array([[7, -7, 0, 2147483647], [5, 5, -3, 1]], dtype)
    y = np.array([2, -3, 5, 4], dtype)
    expected = run(primitive(name), x, y)
    np.testing.assert_array_equal(call(name, x, y, to=str(expected.dtype)), expected)


@covers(*COMPARISON)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", COMPARISON)
def test_comparison(name, dtype):
    x = np.array([1.0, -2.0, 0.5, np.inf, np.nan, -0.0], np.float16 if dtype == "float16" else np.float32)
    y = np.array([1.0, 2.0, 0.25, np.inf, np.nan, 0.0], x.dtype)
    np.testing.assert_array_equal(call(name, x, y, to="bool"), run(primitive(name), x, y))


@covers("LogicalAnd", "LogicalOr", "LogicalNot")
def test_logic():
    x, y = np.array([[True, True, False, False]] * 3), np.array([True, False, True, False])
    for name in ("LogicalAnd", "LogicalOr"):
        np.testing.assert_array_equal(call(name, x, y, to="bool"), run(primitive(name), x, y))
    np.testing.assert_array_equal(call("LogicalNot", x, to="bool"), run(primitive("LogicalNot"), x))


@covers(*SCALAR)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SCALAR)
def test_python_scalar_keeps_the_tensors_dtype(name, dtype):
    x = random((3, 5), dtype)
    scalar = 0.3  # not exact in any of the dtypes
    expected = run(lambda tensor: primitive(SCALAR[name])(tensor, scalar), x.astype(np.float32), dtype=dtype)
    np.testing.assert_allclose(call(name, x, scalar, to=dtype), expected, **tolerance(dtype))


@covers("Muls", "Divs")
def test_integer_tensor_with_a_python_float_is_float32():
    x = np.array([[7, -7, 0]], np.int32)
    for name in ("Muls", "Divs"):
        expected = run(primitive(SCALAR[name]), x, 0.3)
        assert expected.dtype == np.float32
        np.testing.assert_allclose(call(name, x, 0.3), expected, rtol=1e-6)


@covers("Pow")
@pytest.mark.parametrize("dtype", FLOATS)
def test_power(dtype):
    x, y = np.abs(random((4, 3), dtype)) + 0.5, random((3,), dtype, 1)
    if dtype == "bfloat16":
        x = call("Cast", x, to=dtype)
    expected = run(primitive("Pow"), x, y, dtype=dtype)
    np.testing.assert_allclose(call("Pow", x, y, to=dtype), expected, **tolerance(dtype))


@covers(*UNARY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 5), (), (2, 1, 7)])
@pytest.mark.parametrize("name", UNARY)
def test_unary(name, shape, dtype):
    x = random(shape, dtype)
    if name in ("Sqrt", "Rsqrt", "Reciprocal"):
        x = call("Cast", np.abs(x.astype(np.float32)) + 0.25, to=dtype)
    # the float32 kernel's result, rounded: not every kernel exists in half precision on CPU
    expected = run(primitive(name), x.astype(np.float32), dtype=dtype).astype(x.dtype)
    np.testing.assert_allclose(call(name, x, to=dtype), expected, **tolerance(dtype))


@covers("IsFinite")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_is_finite(dtype):
    x = np.array([0, 1, np.inf, -np.inf, np.nan], dtype)
    np.testing.assert_array_equal(call("IsFinite", x, to="bool"), run(primitive("IsFinite"), x))


@covers("Log")
def test_log():
    x = np.abs(random((3, 5))) + 0.1
    attributes = {"base": -1.0, "scale": 1.0, "shift": 0.0, "cust_aicpu": "Log"}
    np.testing.assert_allclose(call("Log", x, **attributes), run(primitive("Log"), x), **tolerance("float32"))
    with pytest.raises(NotImplementedError, match="Log with base 2.0"):
        call("Log", x, base=2.0)


@covers("Select")
@pytest.mark.parametrize("dtype", [*FLOATS, "int32"])
def test_select(dtype):
    from mindspore import ops

    condition = np.array([[True, False, True]])
    x, y = (
        np.array(random((4, 3), "float32", seed) * 8, np.int32) if dtype == "int32" else random((4, 3), dtype, seed)
        for seed in range(2)
    )
    np.testing.assert_array_equal(call("Select", condition, x, y, to=dtype), run(ops.where, condition, x, y))


@covers("Cast")
@pytest.mark.parametrize(
    "source, target",
    [
        ("float32", "float16"),
        ("float32", "bfloat16"),
        ("float16", "float32"),
        ("float32", "int32"),
        ("bool", "float32"),
        ("bool", "int32"),
        ("int32", "float16"),
        ("float32", "bool"),
    ],
)
def test_cast(source, target):
    import mindspore as ms

    values = [0.0, 1.0, -2.75, 3.1415927, 65519.0, 1.00390625, 1.01171875]
    x = np.array(values + ([70000.0, 1e-8] if target == "float16" else []), source)
    expected = run(lambda tensor: tensor.astype(getattr(ms, target if target != "bool" else "bool_")), x)
    if target == "bfloat16":
        expected = run(lambda tensor: tensor.astype(ms.bfloat16).astype(ms.float32), x)
    np.testing.assert_array_equal(call("Cast", x, 0, to=target), expected)


@covers("AddN")
@pytest.mark.parametrize("dtype", FLOATS)
def test_add_n(dtype):
    tensors = tuple(random((2, 3), dtype, seed) for seed in range(5))
    expected = run(primitive("AddN"), tuple(tensor.astype(np.float32) for tensor in tensors), dtype=dtype)
    np.testing.assert_allclose(call("AddN", tensors, to=dtype), expected, **tolerance(dtype))


@covers("AddN")
def test_add_n_rounds_once():
    tensors = (np.array([2048.0], np.float16), *[np.array([1.0], np.float16)] * 4)  # one by one each 1 would be lost
    assert call("AddN", tensors, to="float16") == 2052


@covers("Addcmul")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_addcmul(dtype):
    from mindspore import ops

    x, a, b = (random((3, 5), dtype, seed) for seed in range(3))
    value = np.array([0.05], dtype)
    expected = run(ops.addcmul, x, a, b, value)
    np.testing.assert_allclose(call("Addcmul", x, a, b, value, to=dtype), expected, **tolerance(dtype))


@covers("SiLU")
@pytest.mark.parametrize("dtype", FLOATS)
def test_silu(dtype):
    from mindspore import ops

    x = random((3, 7), dtype, scale=4.0)
    expected = run(ops.silu, x.astype(np.float32), dtype=dtype)
    np.testing.assert_allclose(call("SiLU", x, to=dtype), expected, **tolerance(dtype))
    assert call("SiLU", np.array([-200.0, 200.0], np.float32)).tolist() == [0, 200]


@covers("SiLUGrad")
def test_silu_grad():
    x, dy = random((3, 7), "float64", scale=3.0), random((3, 7), "float64", 1)
    expected = numeric_gradient(lambda value: call("SiLU", value, to="float64"), [x], dy, 0)
    np.testing.assert_allclose(call("SiLUGrad", dy, x, to="float64"), expected, rtol=1e-8, atol=1e-9)
    for dtype in FLOATS:
        narrow = call("Cast", x, to=dtype), call("Cast", dy, to=dtype)
        np.testing.assert_allclose(
            call("SiLUGrad", narrow[1], narrow[0], to=dtype),
            expected,
            rtol=0,
            atol={"float32": 5e-6, "float16": 5e-3, "bfloat16": 4e-2}[dtype],
        )

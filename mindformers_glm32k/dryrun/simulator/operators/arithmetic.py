"""Element by element: arithmetic, comparison, logic, activations.

fp16 is computed by NumPy, which rounds once from float32; bfloat16 in float32, rounded by the interpreter. Tensors are
broadcast against each other. Sources: the docstrings of mindspore.ops (Add, Muls, …), which name NumPy's functions.
"""

from __future__ import annotations

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import Array, Call, as_output, operator, wide


def _pair(x, y):
    """Both operands as arrays of one dtype. With a Python scalar (Muls, Divs, …), fp16 is widened to float32, and so is
    an integer tensor where the scalar is a float."""
    if not isinstance(x, np.ndarray):
        return tuple(reversed(_pair(y, x)))
    x = np.asarray(x)
    if isinstance(y, np.ndarray):
        dtype = np.result_type(x.dtype, y.dtype)
        return x.astype(dtype, copy=False), y.astype(dtype, copy=False)
    x = wide(x)
    if x.dtype.kind != "f" and isinstance(y, float):
        x = x.astype(np.float32)
    return x, np.asarray(y, x.dtype)


def _binary(function):
    def compute(call, x, y):
        """function(x, y) of two tensors, or of one and a Python scalar, in the compiled dtype: NumPy's of that name."""
        return as_output(function(*_pair(x, y)), call.output)

    return compute


def _unary(function):
    def compute(call, x):
        """function(x), in float32 where x is fp16, rounded once: NumPy's of that name."""
        return as_output(function(wide(x)), call.output)

    return compute


_BINARY = {
    np.add: ("Add", "Adds"),
    np.subtract: ("Sub", "Subs"),
    np.multiply: ("Mul", "Muls"),
    np.divide: ("Div", "RealDiv", "Divs"),
    np.floor_divide: ("FloorDiv",),
    np.mod: ("FloorMod",),
    np.power: ("Pow",),
    np.maximum: ("Maximum",),
    np.minimum: ("Minimum",),
    np.equal: ("Equal",),
    np.not_equal: ("NotEqual",),
    np.greater: ("Greater",),
    np.greater_equal: ("GreaterEqual",),
    np.less: ("Less",),
    np.less_equal: ("LessEqual",),
    np.logical_and: ("LogicalAnd",),
    np.logical_or: ("LogicalOr",),
}
_UNARY = {
    np.negative: "Neg",
    np.abs: "Abs",
    np.square: "Square",
    np.sqrt: "Sqrt",
    np.exp: "Exp",
    np.sin: "Sin",
    np.cos: "Cos",
    np.tanh: "Tanh",
    np.logical_not: "LogicalNot",
    np.isfinite: "IsFinite",
    np.reciprocal: "Reciprocal",
    (lambda x: 1 / np.sqrt(x)): "Rsqrt",
}
for _function, _names in _BINARY.items():
    operator(*_names)(_binary(_function))
for _function, _name in _UNARY.items():
    operator(_name)(_unary(_function))


@operator("Log")
def log(call: Call, x: Array) -> Array:
    """Natural logarithm; only the defaults (-1, 1, 0) of the attributes base, scale and shift are implemented."""
    for name, known in (("base", -1.0), ("scale", 1.0), ("shift", 0.0)):
        call.require(known, **{name: call.attributes.get(name, known)})
    return as_output(np.log(wide(x)), call.output)


@operator("Select")
def select(call: Call, condition: Array, x: Array, y: Array) -> Array:
    """Elements of x where condition holds, else of y; broadcast. Source: mindspore.ops.select."""
    return as_output(np.where(condition, *_pair(x, y)), call.output)


@operator("Cast")
def cast(call: Call, x: Array, dtype: int | None = None) -> Array:
    """x in another dtype; `dtype` is MindSpore's enum value, the compiled result has the name."""
    return as_output(x, call.output)


@operator("AddN")
def add_n(call: Call, tensors: tuple[Array, ...]) -> Array:
    """Sum of a tuple of tensors of one shape, accumulated in float32 for fp16 and rounded once (as Ascend's AddN)."""
    total = wide(tensors[0])
    for tensor in tensors[1:]:
        total = total + wide(tensor)
    return as_output(total, call.output)


@operator("Addcmul")
def addcmul(call: Call, x: Array, x1: Array, x2: Array, value: Array | float) -> Array:
    """x + value * x1 * x2. Source: mindspore.ops.addcmul."""
    return as_output(wide(x) + wide(x1) * wide(x2) * wide(np.asarray(value)), call.output)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) of a float32 or float64 array."""
    return 1 / (1 + np.exp(-x))


@operator("SiLU")
def silu(call: Call, x: Array) -> Array:
    """x * sigmoid(x). Source: mindspore.ops.silu."""
    x = wide(x)
    return as_output(x * sigmoid(x), call.output)


@operator("SiLUGrad")
def silu_grad(call: Call, dout: Array, x: Array) -> Array:
    """dout * d(x sigmoid(x))/dx."""
    x = wide(x)
    gate = sigmoid(x)
    return as_output(wide(dout) * (gate * (1 + x * (1 - gate))), call.output)

"""The table of operators: what a compiled program's primitives compute, each a NumPy function.

An operator's function is called with a Call and the primitive's inputs:

    @operator("MatMul")
    def matmul(call, x, y, transpose_a=False, transpose_b=False):
        \"\"\"x (m, k) @ y (k, n) -> (m, n).\"\"\"

Tensors come as NumPy arrays, other inputs as Python values (int, float, str, None, tuples; the file holds a bool as 0
or 1, and an empty tuple as None). bfloat16, which NumPy lacks, is held in float32 arrays whose values are bfloat16's:
the interpreter rounds every result whose `call.output` says so. Results are an array or a tuple of arrays, of the
shape and dtype of `call.output`; the interpreter checks both. Inputs must not be changed: they may be parameters or
other operators' results.

An operator that updates parameters is registered with in_place=True; it gets `Parameter` objects where the
program passes parameters, assigns their `.value`, and returns what the program sees.

Inputs and attributes that are not implemented raise NotImplementedError, a missing attribute raises KeyError: no
default is guessed. Overflow and NaN are values like any other; operators run under `numpy.errstate(all="ignore")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Spec
from mindformers_glm32k.weights.tensors import cast

if TYPE_CHECKING:
    from mindformers_glm32k.dryrun.simulator.network import Network

__all__ = [
    "Array",
    "Call",
    "NUMPY",
    "Operator",
    "Parameter",
    "as_output",
    "collectives_of",
    "from_bytes",
    "operator",
    "plain",
    "round_bfloat16",
    "rounded",
    "table",
    "wide",
]
_MODULES = ("arithmetic", "attention", "collectives", "inference", "reductions", "shaping", "training")
Array = np.ndarray
NUMPY = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.float32,
    "bool": np.bool_,
    **{f"{kind}{bits}": getattr(np, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "complex64": np.complex64,
    "complex128": np.complex128,
}


@dataclass
class Call:
    """One call of a primitive."""

    op: str
    attributes: dict[str, Any]  # axes, masks, groups, …
    output: Any  # Spec of the result, or a (nested) tuple of them
    rank: int = 0
    network: Network | None = None  # for collectives
    location: str = ""  # "MatMul-op12 in Default/…", for messages
    status: Any = None  # the device's overflow register, an object with `overflow` (bool); the interpreter sets it

    def attribute(self, name: str) -> Any:
        """An attribute that must be there; KeyError with all attributes where it is not."""
        if name not in self.attributes:
            raise KeyError(f"{self.op} has no attribute {name!r}, only {sorted(self.attributes)}")
        return self.attributes[name]

    def require(self, known: Any, **found: Any) -> None:
        """Refuses what is not implemented: NotImplementedError with the input or attribute that is not `known`."""
        for name, value in found.items():
            if value is not known and value != known:
                raise NotImplementedError(f"{self.op} with {name} {value!r}: only {known!r} is implemented")


@dataclass(frozen=True)
class Operator:
    """An entry of the table; with `in_place` the function gets Parameters."""

    function: Callable
    in_place: bool = False


_TABLE: dict[str, Operator] = {}


def operator(*names: str, in_place: bool = False) -> Callable[[Callable], Callable]:
    """Decorator: enters a function into the table under the primitives' names; ValueError where one is taken."""

    def enter(function: Callable) -> Callable:
        for name in names:
            if name in _TABLE:
                raise ValueError(f"operator {name} is in the table twice")
            _TABLE[name] = Operator(function, in_place)
        return function

    return enter


def table() -> dict[str, Operator]:
    """All operators by the primitive's name."""
    for name in _MODULES:
        import_module(f"{__name__}.{name}")
    return _TABLE


def collectives_of(executed: Mapping[str, int]) -> dict[str, int]:
    """The collectives, sends and receives in `executed` (operator -> calls)."""
    return {
        name: count
        for name, count in executed.items()
        if table()[name].function.__module__ == f"{__name__}.collectives"
    }


class Parameter:
    """A weight, optimizer state or counter of one rank; operators replace its value, none writes into the array.

    `name` is a checkpoint's, `dtype` the program's ("bfloat16", …).
    """

    __slots__ = ("name", "value", "dtype")

    def __init__(self, name: str, value: Array, dtype: str):
        self.name, self.value, self.dtype = name, value, dtype


def plain(value: Any) -> Any:
    """The value behind a Parameter, also inside tuples."""
    if isinstance(value, Parameter):
        return value.value
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def round_bfloat16(array: Array) -> Array:
    """float32 values rounded to the nearest bfloat16, ties to even; still float32."""
    flat = np.ascontiguousarray(array, np.float32).reshape(-1)
    return cast(cast(flat, "fp32", "bf16"), "bf16", "fp32").reshape(np.shape(array))


def rounded(array: Array, dtype: str) -> Array:
    """float32 values that a kernel holds in `dtype` for a moment: rounded, but still float32."""
    if dtype == "bfloat16":
        return round_bfloat16(array)
    return array.astype(np.float16).astype(np.float32) if dtype == "float16" else array


def wide(array: Array) -> Array:
    """float16 as float32, in which NPU and CPU kernels accumulate; everything else as it is."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def as_output(array: Array | np.generic, spec: Spec) -> Array:
    """An array (or NumPy scalar) in the dtype of a result."""
    return np.asarray(array).astype(NUMPY[spec.dtype], copy=False)


def from_bytes(data: bytes, spec: Spec) -> Array:
    """A tensor from its little-endian bytes, row-major; read-only."""
    if spec.dtype == "bfloat16":
        return cast(np.frombuffer(data, np.uint16), "bf16", "fp32").reshape(spec.shape)
    return np.frombuffer(data, NUMPY[spec.dtype]).reshape(spec.shape)

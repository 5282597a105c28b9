"""What a program's values are, and the precision that operators compute in.

bfloat16, which NumPy lacks, is held in float32 arrays whose values are bfloat16's (see `operators`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Spec
from mindformers_glm32k.weights.tensors import cast

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

"""What a program's values are while it is executed: arrays, parameters, closures, and the constants of its file.

bfloat16, which NumPy lacks, is held in float32 arrays whose values are bfloat16's (see `operators`).
"""

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Graph, Spec
from mindformers_glm32k.weights.dtypes import cast

NUMPY = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.float32,
    "bool": np.bool_,
    **{
        name: getattr(np, name)
        for name in (
            "int8",
            "int16",
            "int32",
            "int64",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
            "complex64",
            "complex128",
        )
    },
}


class Parameter:
    """A weight, optimizer state or counter of one rank; operators replace its value, none writes into the array.

    Args:
        name (str): as in a checkpoint.
        value (numpy.ndarray): what this rank holds.
        dtype (str): "bfloat16", …
    """

    __slots__ = ("name", "value", "dtype")

    def __init__(self, name, value, dtype):
        self.name, self.value, self.dtype = name, value, dtype


class Closure:
    """A graph with some of its inputs.

    Args:
        graph (Graph): what is called.
        arguments (tuple): its first inputs.
    """

    __slots__ = ("graph", "arguments")

    def __init__(self, graph, arguments=()):
        self.graph: Graph = graph
        self.arguments = arguments


def plain(value):
    """The value behind a Parameter, also inside tuples."""
    if isinstance(value, Parameter):
        return value.value
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def round_bfloat16(array):
    """Rounds float32 values to the nearest bfloat16, ties to even.

    Args:
        array (numpy.ndarray): float32.

    Returns:
        numpy.ndarray: float32.
    """
    flat = np.ascontiguousarray(array, np.float32).reshape(-1)
    return cast(cast(flat, "fp32", "bf16"), "bf16", "fp32").reshape(np.shape(array))


def from_bytes(data, spec):
    """A tensor from its bytes.

    Args:
        data (bytes): little-endian, row by row.
        spec (Spec): shape and dtype.

    Returns:
        numpy.ndarray: read-only.
    """
    if spec.dtype == "bfloat16":
        return cast(np.frombuffer(data, np.uint16), "bf16", "fp32").reshape(spec.shape)
    return np.frombuffer(data, NUMPY[spec.dtype]).reshape(spec.shape)


def constant(node):
    """The value of a constant node: an array for tensors, else what the file says."""
    if isinstance(node.value, Spec):
        return from_bytes(node.data, node.value)
    return node.value

"""What several operators share: the precision they compute in, and the dtype they answer with."""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators.values import NUMPY, round_bfloat16


def as_output(array, spec):
    """An array (or NumPy scalar) in a result's dtype.

    Args:
        array (numpy.ndarray | numpy.generic): the values.
        spec (mindir.Spec): of the result.

    Returns:
        numpy.ndarray
    """
    return np.asarray(array).astype(NUMPY[spec.dtype], copy=False)


def wide(array):
    """float16 as float32, in which NPU and CPU kernels accumulate; everything else as it is."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def rounded(array, dtype):
    """float32 values that a kernel holds in `dtype` for a moment: rounded, but still float32.

    Args:
        array (numpy.ndarray): float32.
        dtype (str): "float16", "bfloat16", "float32".

    Returns:
        numpy.ndarray: float32.
    """
    if dtype == "bfloat16":
        return round_bfloat16(array)
    return array.astype(np.float16).astype(np.float32) if dtype == "float16" else array


def refuse(call, **found):
    """Raises for what an operator does not implement.

    Args:
        call (Call): whose.
        found (dict): name of the input or attribute -> (what was found, what is implemented); equal ones pass.

    Raises:
        NotImplementedError: something differs. The message names it.
    """
    for name, (value, known) in found.items():
        if value is not known and value != known:
            raise NotImplementedError(f"{call.op} with {name} {value!r}: only {known!r} is implemented")


def attribute(call, name):
    """An attribute that must be there.

    Raises:
        KeyError: it is missing. The message names the operator's attributes.
    """
    if name not in call.attributes:
        raise KeyError(f"{call.op} has no attribute {name!r}, only {sorted(call.attributes)}")
    return call.attributes[name]


def axes(axis, rank):
    """The axes of a reduction.

    Args:
        axis (int | tuple[int] | None): as the program states it; None and () mean all.
        rank (int): of the tensor.

    Returns:
        tuple[int]: not negative.
    """
    if axis is None or axis == ():
        return tuple(range(rank))
    return tuple(int(item) % rank for item in (axis if isinstance(axis, tuple) else (axis,)))

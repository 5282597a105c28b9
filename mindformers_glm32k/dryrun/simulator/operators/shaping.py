"""Shapes: what moves or repeats elements and computes nothing."""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import operator
from mindformers_glm32k.dryrun.simulator.operators.numeric import attribute


@operator("Reshape")
def reshape(call, x, shape):
    """x in another shape (one entry may be -1), row-major; None, the file's empty tuple, is the shape of a scalar."""
    return np.reshape(x, () if shape is None else shape)


@operator("Transpose")
def transpose(call, x, permutation):
    """Axis i of the result is axis permutation[i] of x."""
    return np.ascontiguousarray(np.transpose(x, permutation))


@operator("ExpandDims")
def expand_dims(call, x, axis):
    """x with an axis of 1 at `axis`."""
    return np.expand_dims(x, axis)


@operator("Squeeze")
def squeeze(call, x):
    """x without the axes of 1 that the attribute `axis` names; all of them where it is empty."""
    axis = attribute(call, "axis")
    return np.squeeze(x, None if axis in (None, ()) else axis)


@operator("Concat")
def concat(call, tensors, axis):
    """A tuple of tensors, joined along `axis`."""
    return np.concatenate(tensors, axis)


@operator("Stack")
def stack(call, tensors):
    """A tuple of tensors of one shape, along a new axis: the attribute `axis`."""
    return np.stack(tensors, attribute(call, "axis"))


@operator("Unstack")
def unstack(call, x):
    """Tuple of x's slices along the attribute `axis`, without it."""
    return tuple(np.moveaxis(x, attribute(call, "axis"), 0))


@operator("Split")
def split(call, x, axis, number):
    """Tuple of `number` equal parts of x along `axis`."""
    return tuple(np.split(x, number, axis))


@operator("SplitWithSize")
def split_with_size(call, x, sizes, axis):
    """Tuple of parts of x along `axis`, of the sizes given; they must sum to all of it."""
    if sum(sizes) != x.shape[axis]:
        raise ValueError(f"sizes {sizes} of axis {axis} of {x.shape}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


@operator("Tile")
def tile(call, x, multiples):
    """x repeated multiples[i] times along axis i; x gets leading axes where multiples is longer."""
    if len(multiples) < x.ndim:
        raise ValueError(f"multiples {multiples} are fewer than the axes of {x.shape}")
    return np.tile(x, multiples)


@operator("BroadcastTo")
def broadcast_to(call, x, shape):
    """x repeated to `shape`; -1 keeps an axis."""
    first = len(shape) - x.ndim
    shape = tuple(x.shape[index - first] if size == -1 else size for index, size in enumerate(shape))
    return np.array(np.broadcast_to(x, shape))


@operator("TensorMove")
def tensor_move(call, x):
    """A copy of x."""
    return np.array(x)


@operator("ZerosLike")
def zeros_like(call, x):
    """Zeros of x's shape and dtype."""
    return np.zeros_like(x)


@operator("OnesLike")
def ones_like(call, x):
    """Ones of x's shape and dtype."""
    return np.ones_like(x)


@operator("TensorToTuple")
def tensor_to_tuple(call, x):
    """The elements of x (n) as a tuple of Python numbers."""
    return tuple(x.tolist())

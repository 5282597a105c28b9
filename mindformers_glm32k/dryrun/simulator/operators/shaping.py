"""What moves, takes or repeats elements: shapes, slices, look-ups, and the gradients that scatter back."""

from __future__ import annotations

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import Array, Call, as_output, operator, wide

Ints = tuple[int, ...]


@operator("Reshape")
def reshape(call: Call, x: Array, shape: Ints | None) -> Array:
    """x in another shape (one entry may be -1), row-major; None, the file's empty tuple, is the shape of a scalar."""
    return np.reshape(x, () if shape is None else shape)


@operator("Transpose")
def transpose(call: Call, x: Array, permutation: Ints) -> Array:
    """Axis i of the result is axis permutation[i] of x."""
    return np.ascontiguousarray(np.transpose(x, permutation))


@operator("ExpandDims")
def expand_dims(call: Call, x: Array, axis: int) -> Array:
    """x with an axis of 1 at `axis`."""
    return np.expand_dims(x, axis)


@operator("Squeeze")
def squeeze(call: Call, x: Array) -> Array:
    """x without the axes of 1 that the attribute `axis` names; all of them where it is empty."""
    axis = call.attribute("axis")
    return np.squeeze(x, None if axis in (None, ()) else axis)


@operator("Concat")
def concat(call: Call, tensors: tuple[Array, ...], axis: int) -> Array:
    """A tuple of tensors, one behind the other along `axis`."""
    return np.concatenate(tensors, axis)


@operator("Stack")
def stack(call: Call, tensors: tuple[Array, ...]) -> Array:
    """A tuple of tensors of one shape, along a new axis: the attribute `axis`."""
    return np.stack(tensors, call.attribute("axis"))


@operator("Unstack")
def unstack(call: Call, x: Array) -> tuple[Array, ...]:
    """Tuple of x's slices along the attribute `axis`, without it."""
    return tuple(np.moveaxis(x, call.attribute("axis"), 0))


@operator("Split")
def split(call: Call, x: Array, axis: int, output_num: int) -> tuple[Array, ...]:
    """Tuple of `output_num` equal chunks of x along `axis`."""
    return tuple(np.split(x, output_num, axis))


@operator("SplitWithSize")
def split_with_size(call: Call, x: Array, sizes: Ints, axis: int) -> tuple[Array, ...]:
    """Tuple of chunks of x along `axis`, of the sizes given; they must sum to all of it."""
    if sum(sizes) != x.shape[axis]:
        raise ValueError(f"sizes {sizes} of axis {axis} of {x.shape}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


@operator("Tile")
def tile(call: Call, x: Array, multiples: Ints) -> Array:
    """x repeated multiples[i] times along axis i; x gets leading axes where multiples is longer."""
    if len(multiples) < x.ndim:
        raise ValueError(f"multiples {multiples} are fewer than the axes of {x.shape}")
    return np.tile(x, multiples)


@operator("BroadcastTo")
def broadcast_to(call: Call, x: Array, shape: Ints) -> Array:
    """x repeated to `shape`; -1 keeps an axis."""
    first = len(shape) - x.ndim
    shape = tuple(x.shape[index - first] if size == -1 else size for index, size in enumerate(shape))
    return np.array(np.broadcast_to(x, shape))


def _like(function):
    def compute(call, x):
        """A copy of x, or zeros or ones of its shape and dtype: NumPy's function."""
        return function(x)

    return compute


for _name, _function in (("TensorMove", np.array), ("ZerosLike", np.zeros_like), ("OnesLike", np.ones_like)):
    operator(_name)(_like(_function))


@operator("TensorToTuple")
def tensor_to_tuple(call: Call, x: Array) -> tuple:
    """The elements of x (n) as a tuple of Python numbers."""
    return tuple(x.tolist())


_MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


def _index(begin, end, strides, masks):
    """NumPy's index of a strided slice.

    begin, end, strides have one entry an axis; bit i of the masks (begin, end, ellipsis, new axis, shrink) is of entry
    i. A set bit of begin (end) starts at the first (ends after the last) element, one of shrink takes the one at begin.
    """
    begin_mask, end_mask, ellipsis_mask, new_axis_mask, shrink_mask = (int(mask) for mask in masks)
    if ellipsis_mask or new_axis_mask:
        raise NotImplementedError(f"a strided slice with ellipsis_mask {ellipsis_mask}, new_axis_mask {new_axis_mask}")
    index = []
    for axis, (start, stop, stride) in enumerate(zip(begin, end, strides)):
        if shrink_mask >> axis & 1:
            index.append(start)
        else:
            first = None if begin_mask >> axis & 1 else start
            index.append(slice(first, None if end_mask >> axis & 1 else stop, stride))
    return tuple(index)


def _masks(call, given):
    """The five masks: inputs of the primitive, or its attributes."""
    if len(given) not in (0, len(_MASKS)):
        raise ValueError(f"{call.op} with {len(given)} masks: {given}")
    return given or tuple(call.attribute(name) for name in _MASKS)


@operator("Slice")
def slice_of_size(call: Call, x: Array, begin: Ints, size: Ints) -> Array:
    """x[begin:begin + size] along each axis; a size of -1 reaches to the end. Source: mindspore.ops.slice."""
    ends = [length if count == -1 else start + count for start, count, length in zip(begin, size, x.shape)]
    if len(begin) != x.ndim or len(size) != x.ndim or any(end > length for end, length in zip(ends, x.shape)):
        raise ValueError(f"a slice from {tuple(begin)} of {tuple(size)} elements is not inside {x.shape}")
    return np.array(x[tuple(slice(start, end) for start, end in zip(begin, ends))])


@operator("StridedSlice")
def strided_slice(call: Call, x: Array, begin: Ints, end: Ints, strides: Ints, *masks: int) -> Array:
    """x[begin:end:strides] with masks, as inputs or attributes; see `_index`. Source: mindspore.ops.strided_slice."""
    return np.array(x[_index(begin, end, strides, _masks(call, masks))])


@operator("StridedSliceGrad")
def strided_slice_grad(call: Call, dy: Array, shape: Ints, begin: Ints, end: Ints, strides: Ints, *masks: int) -> Array:
    """Zeros of `shape` with dy where the slice was taken."""
    dx = np.zeros(shape, dy.dtype)
    index = _index(begin, end, strides, _masks(call, masks))
    if dx[index].shape != dy.shape:
        raise ValueError(f"the slice of {shape} is {dx[index].shape}, its gradient {dy.shape}")
    dx[index] = dy
    return dx


@operator("Gather")
def gather(call: Call, x: Array, indices: Array, axis: int, batch_dims: int = 0) -> Array:
    """x taken at `indices` along `axis`: shape x[:axis] + indices + x[axis + 1:]. Source: mindspore.ops.gather.

    An index below 0 or beyond the axis is an IndexError; an NPU reads whatever is there.
    """
    call.require(0, batch_dims=batch_dims)
    _check_range(indices, x.shape[int(axis)])
    return np.take(x, indices, int(axis))


@operator("GatherD")
def gather_d(call: Call, x: Array, dim: int, index: Array) -> Array:
    """x[i, index[i, j]] (for dim 1) -> index.shape. Source: mindspore.ops.gather_elements."""
    _check_range(index, x.shape[int(dim)])
    return np.take_along_axis(x, index, int(dim))


@operator("TensorScatterAdd")
def tensor_scatter_add(call: Call, x: Array, indices: Array, updates: Array) -> Array:
    """A copy of x with updates (n,) added at indices (n, x.ndim). Source: mindspore.ops.tensor_scatter_add."""
    call.require(x.ndim, indices=indices.shape[-1])
    for axis in range(x.ndim):
        _check_range(indices[..., axis], x.shape[axis])
    total = wide(x).copy()
    np.add.at(total, tuple(np.moveaxis(indices, -1, 0)), wide(updates))
    return as_output(total, call.output)


@operator("UnsortedSegmentSum")
def unsorted_segment_sum(call: Call, x: Array, segments: Array, num_segments: int) -> Array:
    """x (segments.shape, …) summed by segment -> (num_segments, …); rows of negative segments are dropped.

    float32 sums for fp16, rounded once. Source: mindspore.ops.unsorted_segment_sum.
    """
    rows = wide(x).reshape((-1,) + x.shape[segments.ndim :])
    segments = segments.reshape(-1)
    kept = segments >= 0
    _check_range(segments[kept], num_segments)
    total = np.zeros((int(num_segments),) + rows.shape[1:], rows.dtype)
    np.add.at(total, segments[kept], rows[kept])
    return as_output(total, call.output)


@operator("OneHot")
def one_hot(call: Call, indices: Array, depth: int, on_value: float, off_value: float, axis: int = -1) -> Array:
    """on_value at the index, off_value elsewhere, along a new axis of `depth`; an index outside of it has no on_value.

    Source: mindspore.ops.one_hot.
    """
    hot = np.equal(indices[..., None], np.arange(depth))
    result = np.where(hot, on_value, off_value)
    return as_output(np.moveaxis(result, -1, int(axis)), call.output)


def _check_range(indices, size):
    outside = (indices < 0) | (indices >= size)
    if outside.any():
        raise IndexError(f"index {indices[outside].flat[0]} of an axis of {size}")

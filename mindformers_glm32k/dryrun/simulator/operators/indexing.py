"""Slices, look-ups, and the gradients that scatter back."""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import operator
from mindformers_glm32k.dryrun.simulator.operators.numeric import as_output, attribute, wide

_MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


def _index(begin, end, strides, masks):
    """NumPy's index of a strided slice.

    Args:
        begin, end, strides (tuple[int]): one entry an axis.
        masks (tuple[int]): begin, end, ellipsis, new axis, shrink: bit i is of entry i. A set bit of begin (end)
            starts at the first (ends behind the last) element, of shrink takes the one element at begin.

    Raises:
        NotImplementedError: an ellipsis or a new axis.
    """
    begin_mask, end_mask, ellipsis_mask, new_axis_mask, shrink_mask = (int(mask) for mask in masks)
    if ellipsis_mask or new_axis_mask:
        raise NotImplementedError(f"a strided slice with ellipsis_mask {ellipsis_mask}, new_axis_mask {new_axis_mask}")
    index = []
    for axis, (start, stop, stride) in enumerate(zip(begin, end, strides)):
        if shrink_mask >> axis & 1:
            index.append(start)
        else:
            index.append(
                slice(None if begin_mask >> axis & 1 else start, None if end_mask >> axis & 1 else stop, stride)
            )
    return tuple(index)


def _masks(call, given):
    """The five masks: inputs of the primitive, or its attributes."""
    if len(given) not in (0, len(_MASKS)):
        raise ValueError(f"{call.op} with {len(given)} masks: {given}")
    return given or tuple(attribute(call, name) for name in _MASKS)


@operator("Slice")
def slice_of_size(call, x, begin, size):
    """x[begin:begin + size] along each axis; a size of -1 reaches to the end. Source: mindspore.ops.slice.

    Raises:
        ValueError: the slice reaches beyond x.
    """
    ends = [length if count == -1 else start + count for start, count, length in zip(begin, size, x.shape)]
    if len(begin) != x.ndim or len(size) != x.ndim or any(end > length for end, length in zip(ends, x.shape)):
        raise ValueError(f"a slice from {tuple(begin)} of {tuple(size)} elements is not inside {x.shape}")
    return np.array(x[tuple(slice(start, end) for start, end in zip(begin, ends))])


@operator("StridedSlice")
def strided_slice(call, x, begin, end, strides, *masks):
    """x[begin:end:strides] with masks, as inputs or attributes; see `_index`. Source: mindspore.ops.strided_slice."""
    return np.array(x[_index(begin, end, strides, _masks(call, masks))])


@operator("StridedSliceGrad")
def strided_slice_grad(call, dy, shape, begin, end, strides, *masks):
    """Zeros of `shape` with dy where the slice was taken."""
    dx = np.zeros(shape, dy.dtype)
    index = _index(begin, end, strides, _masks(call, masks))
    if dx[index].shape != dy.shape:
        raise ValueError(f"the slice of {shape} is {dx[index].shape}, its gradient {dy.shape}")
    dx[index] = dy
    return dx


@operator("Gather")
def gather(call, x, indices, axis, batch_dims=0):
    """x taken at `indices` along `axis`: shape x[:axis] + indices + x[axis + 1:]. Source: mindspore.ops.gather.

    Raises:
        IndexError: an index below 0 or beyond the axis (an NPU reads whatever is there).
    """
    if batch_dims != 0:
        raise NotImplementedError(f"Gather with batch_dims {batch_dims}: only 0 is implemented")
    _check_range(indices, x.shape[int(axis)])
    return np.take(x, indices, int(axis))


@operator("UnsortedSegmentSum")
def unsorted_segment_sum(call, x, segments, number):
    """x (segments.shape, …) summed by segment -> (number, …); rows of negative segments are dropped.

    float32 sums for fp16, rounded once. Source: mindspore.ops.unsorted_segment_sum.
    """
    rows = wide(x).reshape((-1,) + x.shape[segments.ndim :])
    segments = segments.reshape(-1)
    kept = segments >= 0
    _check_range(segments[kept], number)
    total = np.zeros((int(number),) + rows.shape[1:], rows.dtype)
    np.add.at(total, segments[kept], rows[kept])
    return as_output(total, call.output)


@operator("OneHot")
def one_hot(call, indices, depth, on_value, off_value, axis=-1):
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

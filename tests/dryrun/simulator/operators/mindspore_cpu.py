"""MindSpore's CPU kernels as the reference of operators that exist there."""

import numpy as np


def run(function, *inputs, dtype=None):
    """Runs a MindSpore function in PyNative mode on CPU.

    Args:
        function (callable): of Tensors (and of what is passed through as it is).
        inputs: numpy arrays become Tensors; bfloat16 ones stay float32.
        dtype (str | None): "bfloat16": the result is rounded by MindSpore's Cast.

    Returns:
        numpy.ndarray, or a tuple of them.
    """
    import mindspore as ms

    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        return _array(function(*(_tensor(item) for item in inputs)), dtype)
    finally:
        ms.set_context(mode=mode)


def _tensor(item):
    import mindspore as ms

    if isinstance(item, np.ndarray):
        return ms.Tensor(item)
    return tuple(_tensor(entry) for entry in item) if isinstance(item, tuple) else item


def _array(result, dtype):
    import mindspore as ms

    if isinstance(result, (tuple, list)):
        return tuple(_array(item, dtype) for item in result)
    if dtype == "bfloat16" and result.dtype == ms.float32:
        result = result.astype(ms.bfloat16).astype(ms.float32)
    return result.asnumpy()

"""Matrix products: float32 sums, rounded once."""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import operator
from mindformers_glm32k.dryrun.simulator.operators.numeric import as_output, wide


def _product(call, x, y, transpose_a, transpose_b):
    x = np.swapaxes(x, -1, -2) if transpose_a else x
    y = np.swapaxes(y, -1, -2) if transpose_b else y
    return as_output(np.matmul(wide(x), wide(y)), call.output)


@operator("MatMul")
def matmul(call, x, y, transpose_a=False, transpose_b=False):
    """x (m, k) @ y (k, n) -> (m, n); x is (k, m) with transpose_a, y (n, k) with transpose_b.

    Source: mindspore.ops.MatMul.
    """
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"MatMul takes matrices, not {x.shape} and {y.shape}")
    return _product(call, x, y, transpose_a, transpose_b)


@operator("BatchMatMul", "MatMulExt", "BatchMatMulExt")
def batch_matmul(call, x, y, transpose_a=False, transpose_b=False):
    """x (…, m, k) @ y (…, k, n) -> (…, m, n), leading axes broadcast. Source: mindspore.ops.BatchMatMul."""
    return _product(call, x, y, transpose_a, transpose_b)


@operator("BiasAdd")
def bias_add(call, x, bias):
    """x (n, c) or (n, c, …) + bias (c), in the layout NCHW."""
    return as_output(x + bias.reshape((-1,) + (1,) * (x.ndim - 2)), call.output)

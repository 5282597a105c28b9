"""SplitLastAxis against NumPy."""

import mindspore as ms
import numpy as np

from mindformers_glm32k.kernels.cpu.split import SplitLastAxis


def test_pieces_and_gradient():
    x = np.arange(2 * 3 * 10, dtype=np.float32).reshape(2, 3, 10)
    cell = SplitLastAxis()
    sizes = (4, 1, 5)
    for ours, theirs in zip(cell(ms.Tensor(x), sizes, 2), np.split(x, np.cumsum(sizes)[:-1], 2)):
        np.testing.assert_array_equal(ours.asnumpy(), theirs)

    def weighted(value):
        first, second, third = cell(value, sizes, 2)
        return first.sum() + 2 * second.sum() + 3 * third.sum()

    gradient = ms.grad(weighted)(ms.Tensor(x)).asnumpy()
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.repeat([1.0, 2.0, 3.0], sizes), x.shape))

"""The substitution leaves upstream as it was, whatever happens in between."""

import mindspore as ms
import numpy as np
import pytest
from mindformers.models.glm2 import glm2, glm2_transformer

from mindformers_glm32k import GLM32KConfig
from mindformers_glm32k.kernels.ascend.flash_attention import CompressedCausalAttention
from mindformers_glm32k.kernels.cpu.paged_attention import NoCache, PagedAttention
from mindformers_glm32k.kernels.cpu.tiled_attention import TiledAttention
from mindformers_glm32k.kernels.substitution import cells_for, split_last_axis

NAMES = ("ChatGLM2RMSNorm", "FlashAttention", "InferAttention", "CoreAttention")


def bound():
    return [glm2.ChatGLM2Model] + [getattr(glm2_transformer, name) for name in NAMES]


@pytest.mark.parametrize(
    "cells, use_past, attention, cache",
    [
        ("portable", False, TiledAttention, NoCache),
        ("portable", True, TiledAttention, PagedAttention),
        ("ascend", False, CompressedCausalAttention, NoCache),
        ("ascend", True, CompressedCausalAttention, None),
    ],
)
def test_bindings_and_their_end(cells, use_past, attention, cache):
    before = bound()
    config = GLM32KConfig(cells=cells, use_past=use_past, is_dynamic=use_past)
    backbone = type("Backbone", (), {})
    with pytest.raises(RuntimeError, match="inside"), cells_for(config, backbone):
        assert glm2.ChatGLM2Model is backbone
        assert glm2_transformer.FlashAttention is attention
        assert glm2_transformer.InferAttention is (cache or before[3])
        raise RuntimeError("inside")
    assert bound() == before


def test_parts_of_the_last_axis_and_their_gradient():
    x = np.arange(2 * 3 * 10, dtype=np.float32).reshape(2, 3, 10)
    sizes = (4, 1, 5)
    for ours, theirs in zip(split_last_axis(ms.Tensor(x), sizes, 2), np.split(x, np.cumsum(sizes)[:-1], 2)):
        np.testing.assert_array_equal(ours.asnumpy(), theirs)

    def weighted(value):
        first, second, third = split_last_axis(value, sizes, 2)
        return first.sum() + 2 * second.sum() + 3 * third.sum()

    gradient = ms.grad(weighted)(ms.Tensor(x)).asnumpy()
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.repeat([1.0, 2.0, 3.0], sizes), x.shape))

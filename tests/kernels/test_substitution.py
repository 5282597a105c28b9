"""The substitution leaves upstream as it was, whatever happens in between."""

import pytest
from mindformers.models.glm2 import glm2, glm2_transformer

from mindformers_glm32k import GLM32KConfig
from mindformers_glm32k.kernels.ascend.flash_attention import CompressedCausalAttention, compressed_causal_mask
from mindformers_glm32k.kernels.cpu.paged_attention import NoCache, PagedAttention
from mindformers_glm32k.kernels.cpu.tiled_attention import BlockwiseAttention
from mindformers_glm32k.kernels.substitution import cells_for

NAMES = ("ChatGLM2RMSNorm", "FlashAttention", "InferAttention", "CoreAttention")


def bound():
    return [glm2.ChatGLM2Model] + [getattr(glm2_transformer, name) for name in NAMES]


@pytest.mark.parametrize(
    "cells, use_past, attention, cache",
    [
        ("portable", False, BlockwiseAttention, NoCache),
        ("portable", True, BlockwiseAttention, PagedAttention),
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


def test_compressed_mask_hides_the_future():
    mask = compressed_causal_mask().asnumpy()
    assert mask.shape == (2048, 2048) and mask.dtype == "uint8"
    assert mask[0, 1] == 1 and mask[1, 0] == 0 and mask[5, 5] == 0 and mask.sum() == 2048 * 2047 // 2

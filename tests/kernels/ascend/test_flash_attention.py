"""The compressed mask, and the ends of packed documents."""

import mindspore as ms
import numpy as np
import pytest

from mindformers_glm32k.kernels.ascend.flash_attention import DocumentEnds, compressed_causal_mask


def sequence(*lengths, length=20):
    """Document ids of a sequence, padding after the last document."""
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return np.append(ids, np.full(length - len(ids), len(lengths))).astype(np.int32)


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_cumulative_lengths_over_all_sequences(mode):
    ms.set_context(mode=mode)
    ids = np.stack([sequence(4, 3, 6), sequence(20), sequence(1, 1, 1, 17), sequence()])
    ends = DocumentEnds(5, 1)(ms.Tensor(ids))
    ms.set_context(mode=ms.GRAPH_MODE)
    assert ends.dtype == ms.int64
    assert ends.asnumpy().reshape(4, 5).tolist() == [
        [4, 7, 13, 20, 20],
        [40, 40, 40, 40, 40],
        [41, 42, 43, 60, 60],
        [80, 80, 80, 80, 80],
    ]


def test_long_sequences_are_counted_exactly():
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(32768 - 100, np.ones(99) / 99)
    ends = DocumentEnds(128, 1)(ms.Tensor(sequence(*lengths, length=32768)[None])).asnumpy()
    np.testing.assert_array_equal(ends, [*np.cumsum(lengths), *[32768] * 29])


def test_no_token_is_left_out():
    assert DocumentEnds(2, 1)(ms.Tensor(sequence(5, 5, 5)[None])).asnumpy().tolist() == [5, 20]


def test_compressed_mask_hides_the_future():
    mask = compressed_causal_mask().asnumpy()
    assert mask.shape == (2048, 2048) and mask.dtype == "uint8"
    assert mask[0, 1] == 1 and mask[1, 0] == 0 and mask[5, 5] == 0 and mask.sum() == 2048 * 2047 // 2

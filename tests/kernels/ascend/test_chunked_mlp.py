"""Sizes of the chunks; what the chunks compute is simulated in tests/dryrun/simulator/test_train.py."""

from types import SimpleNamespace

import pytest

from mindformers_glm32k.kernels.ascend.chunked_mlp import chunk_sizes, reads_the_forward


@pytest.mark.parametrize("length, size", [(32768, 4096), (32768, 5000), (64, 24), (64, 2), (17, 16), (5, 2), (3, 2)])
def test_chunks_hold_all_tokens_and_are_not_alike(length, size):
    sizes = chunk_sizes(length, size)
    assert sum(sizes) == length and min(sizes) > 0
    assert len(sizes) == -(-length // size)
    assert len(set(sizes)) > 1  # the compiler joins equal chunks
    assert max(sizes) <= size + max(1, size // 256)


def test_a_short_row_is_one_chunk():
    assert chunk_sizes(64, 64) == chunk_sizes(64, 100) == (64,)


@pytest.mark.parametrize(
    "recompute, selected, parts",
    [(False, ["mlp"], True), (True, ["mlp"], False), (True, False, False), (False, False, False), (False, [], False)],
)
def test_parts_of_a_layer_are_recomputed(recompute, selected, parts):
    settings = SimpleNamespace(recompute=recompute, select_recompute=selected)
    for stages in (1, 2):
        config = SimpleNamespace(parallel_config=SimpleNamespace(recompute=settings, pipeline_stage=stages))
        assert reads_the_forward(config) is (parts or stages == 1)

"""PagedAttention, reading its cache tile by tile, against a softmax over whole prompts."""

import mindspore as ms
import numpy as np
import pytest

from mindformers_glm32k.kernels.cpu.cached_steps import tiles_to_read
from mindformers_glm32k.kernels.cpu.paged_attention import PagedAttention

GROUPS, Q_PER_KV, SIZE, BLOCK, BLOCKS = 2, 3, 4, 4, 20
PER_TILE, TILES = 2, 4  # 8 keys a tile
SPARE = BLOCKS


def whole(query, keys, values, positions):
    """query (C, G*R*D), keys and values (L, G*D), positions (C,) -> (C, G*R*D), in float64."""
    query = query.reshape(-1, GROUPS, Q_PER_KV, SIZE).astype(np.float64)
    keys, values = keys.reshape(-1, GROUPS, SIZE), values.reshape(-1, GROUPS, SIZE)
    scores = np.einsum("cgrd,lgd->cgrl", query, keys) * 0.5
    hidden = np.arange(len(keys)) > positions[:, None]
    scores[np.broadcast_to(hidden[:, None, None], scores.shape)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("cgrl,lgd->cgrd", weights, values).reshape(len(query), -1)


class Prompts:
    """Keys and values of B prompts by position, and where the cache has them."""

    def __init__(self, batch, dtype):
        random = np.random.default_rng(4)
        length = PER_TILE * BLOCK * TILES
        self.query = random.normal(size=(batch, length, GROUPS * Q_PER_KV * SIZE)).astype(dtype)
        self.key, self.value = random.normal(size=(2, batch, length, GROUPS * SIZE)).astype(dtype)
        self.tables = random.permutation(BLOCKS)[: batch * (BLOCKS // batch)].reshape(batch, -1)

    def call(self, cell, rows, positions, kept, any_scores=True, wide=TILES):
        """The cell on tokens (B, C) at `positions` of prompts `rows`; those not kept go into the spare block."""
        tables = np.full((len(rows), TILES * PER_TILE), SPARE)
        known = min(self.tables.shape[1], TILES * PER_TILE)
        tables[:, :known] = self.tables[rows, :known]
        slots = np.where(kept, np.take_along_axis(tables, positions // BLOCK, 1) * BLOCK + positions % BLOCK, 80)
        heads = np.arange(GROUPS)
        cache_rows = slots[:, :, None] + heads * (BLOCKS + 1) * BLOCK
        width = PER_TILE * BLOCK
        tiles = (tables[:, :, None] * BLOCK + np.arange(BLOCK)).reshape(len(rows), TILES, 1, width)
        tiles = tiles.transpose(1, 0, 2, 3) + heads[:, None] * (BLOCKS + 1) * BLOCK
        last = positions[kept].max() // width
        if wide > 1 and positions.shape[1] == 1:
            order, wide_range = tiles_to_read(last + 1, len(rows), wide)
        else:
            order, wide_range = tiles_to_read(last + 1, len(rows), last + 2)
        large = tiles.reshape(TILES // wide, wide, len(rows), GROUPS, width).transpose(0, 2, 3, 1, 4)
        large = large.reshape(TILES // wide, len(rows), GROUPS, wide * width)
        picked = [array[np.array(rows)[:, None], positions] for array in (self.query, self.key, self.value)]
        tokens = positions.size
        cos, sin = np.ones((tokens, 1, SIZE), self.query.dtype), np.zeros((tokens, 1, SIZE), self.query.dtype)

        def ids(array):
            return ms.Tensor(np.asarray(array, np.int32))

        return cell(
            *map(ms.Tensor, picked),
            (
                ids([*order, *[0] * (TILES - len(order))]),
                ms.mutable(ids(len(order))),
                ids(large),
                *(ms.mutable(ids(bound)) for bound in wide_range),
                any_scores,
            ),
            ids(tiles),
            ids(cache_rows.reshape(-1)),
            (ms.Tensor(cos), ms.Tensor(sin), ms.Tensor(sin)),
            ids(positions),
        ).asnumpy()


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float16, 3e-3)])
@pytest.mark.parametrize("any_scores, wide", [(True, TILES), (False, TILES), (True, 2)])
def test_chunks_and_tokens_see_what_came_before(any_scores, wide, dtype, tolerance):
    cell = PagedAttention(
        GROUPS * Q_PER_KV, SIZE, GROUPS, 0.5, BLOCK, BLOCKS, compute_dtype=ms.Tensor(np.zeros(1, dtype)).dtype
    )
    prompts = Prompts(2, dtype)
    lengths = (19, 11)
    for row, length in enumerate(lengths):
        for start in range(0, length, 4):  # two chunks a tile, the last one padded
            positions = np.arange(start, start + 5)[None]
            kept = (positions < length) & (positions < start + 4)
            got = prompts.call(cell, [row], positions, kept, any_scores)[0][kept[0]]
            positions = positions[0][kept[0]]
            expected = whole(
                prompts.query[row][positions], prompts.key[row][:length], prompts.value[row][:length], positions
            )
            np.testing.assert_allclose(got, expected, atol=tolerance)
    for step in range(4):  # both prompts, one several tiles shorter than the other
        positions = np.array(lengths)[:, None] + step
        got = prompts.call(cell, [0, 1], positions, np.ones((2, 1), bool), any_scores, wide)
        for row in range(2):
            expected = whole(prompts.query[row][positions[row]], prompts.key[row], prompts.value[row], positions[row])
            np.testing.assert_allclose(got[row], expected, atol=tolerance)


def test_scores_that_differ_too_much_for_weights_are_not_silent():
    cell = PagedAttention(GROUPS * Q_PER_KV, SIZE, GROUPS, 0.5, BLOCK, BLOCKS)
    prompts = Prompts(1, np.float32)
    prompts.query *= 100
    for start in (0, 8, 16):
        positions = np.arange(start, start + 8)[None]
        exact = prompts.call(cell, [0], positions, np.ones((1, 8), bool))[0]
        got = prompts.call(cell, [0], positions, np.ones((1, 8), bool), any_scores=False)[0]
        spoilt = np.isnan(got)
        assert spoilt.any() == (start > 0) and not spoilt.all()  # one tile is exact in both modes
        np.testing.assert_allclose(got[~spoilt], exact[~spoilt], atol=1e-4)


def test_scores_of_any_size_do_not_overflow():
    cell = PagedAttention(GROUPS * Q_PER_KV, SIZE, GROUPS, 0.5, BLOCK, BLOCKS)
    prompts = Prompts(1, np.float32)
    prompts.query *= 100
    prompts.key *= 100
    for start in range(0, 32, 8):
        positions = np.arange(start, start + 8)[None]
        got = prompts.call(cell, [0], positions, np.ones((1, 8), bool))[0]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(
        got, whole(prompts.query[0][24:], prompts.key[0], prompts.value[0], np.arange(24, 32)), atol=1e-3
    )


@pytest.mark.parametrize("prompts", [1, 3])
def test_every_used_tile_is_read_once(prompts):
    for used in range(1, 20):
        for wide in (2, 4, used + 1):
            order, (start, end) = tiles_to_read(used, prompts, wide)
            read = [*order, *(tile for j in range(start, end) for tile in range(j * wide, (j + 1) * wide))]
            assert sorted(read) == list(range(used))
            assert order[0] == (used - 1 if prompts == 1 else 0)
            assert end <= used // wide or start >= end

"""Epoch orders over ranks."""

import numpy as np
import pytest

from mindformers_glm32k.data.sampler import EpochSampler, StreamSampler


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_order_of_one_process(shuffle):
    alone = EpochSampler(12, shuffle, seed=3)
    ranks = [EpochSampler(12, shuffle, seed=3, num_shards=3, shard_id=rank) for rank in range(3)]
    for _ in range(4):
        whole, parts = list(alone), [list(rank) for rank in ranks]
        assert [sample for places in zip(*parts) for sample in places] == whole
        assert sorted(whole) == list(range(12))


def test_orders_change_with_epoch_and_seed_alone():
    first, second = (list(EpochSampler(50, True, seed=seed)) for seed in (0, 1))
    again = EpochSampler(50, True, seed=0)
    assert list(again) == first != second
    assert list(again) != first
    assert list(EpochSampler(5, False)) == [0, 1, 2, 3, 4]


def test_ranks_have_equally_many_samples_when_they_do_not_divide():
    ranks = [EpochSampler(11, True, num_shards=4, shard_id=rank) for rank in range(4)]
    for _ in range(3):
        parts = [list(rank) for rank in ranks]
        assert [len(part) for part in parts] == [2] * 4
        assert len({sample for part in parts for sample in part}) == 8
    assert ranks[0].get_num_samples() == 2


def test_samples_of_alike_sizes_come_together_and_each_once():
    sizes = np.random.default_rng(0).integers(0, 1000, 2003)
    for shuffle in (False, True):
        alone = EpochSampler(2003, shuffle, seed=1)
        alone.sort_by(sizes, 8)
        ranks = [EpochSampler(2003, shuffle, seed=1, num_shards=2, shard_id=rank) for rank in range(2)]
        for rank in ranks:
            rank.sort_by(sizes, 8)
        orders = []
        for _ in range(2):
            whole, parts = list(alone), [list(rank) for rank in ranks]
            assert sorted(whole) == list(range(2003))
            assert [sample for places in zip(*parts) for sample in places] == whole[:2002]
            spreads = np.ptp(sizes[np.reshape(whole[:2000], (-1, 8))], axis=1)
            assert spreads.mean() < 30 and (not shuffle or np.abs(np.diff(sizes[whole[:2000:8]])).mean() > 200)
            orders.append(whole)
        assert (orders[0] == orders[1]) is not shuffle


def test_a_streams_places_go_on_from_epoch_to_epoch():
    stream = StreamSampler(4)
    assert [list(stream), list(stream)] == [[0, 1, 2, 3], [4, 5, 6, 7]]

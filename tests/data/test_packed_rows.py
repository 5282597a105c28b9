"""Packed rows by number: plans, and streams that are read at any place."""

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest

from mindformers_glm32k.data.packed_rows import PlannedRows, StreamedRows, plan_rows
from mindformers_glm32k.errors import InputError

CAPACITY = 40


class Tokens:
    """Samples whose first token is their number."""

    cache = None

    def __init__(self, lengths):
        self._lengths = lengths
        self.asked = []

    def __len__(self):
        return len(self._lengths)

    def __getitem__(self, sample):
        self.asked.append(sample)
        ids = np.full(self._lengths[sample], sample, np.int32)
        return SimpleNamespace(input_ids=ids, labels=ids, tokens_before=len(ids) or 99, tokens_after=len(ids))

    def all_lengths(self, threads, start=0):
        assert threads and 0 <= start < len(self)
        return np.array(self._lengths)


class Counter:
    """Stands for CutCounter and PaddingCounter."""

    def __init__(self):
        self.calls = []

    def add(self, *call):
        self.calls.append(call)


@pytest.fixture
def lengths():
    return np.random.default_rng(0).integers(1, CAPACITY + 1, 100).tolist()


def stream(tokens, shard_id=0, num_shards=1, shuffle=True, seed=0, window=3, threads=2, cuts=None, most=None):
    return StreamedRows(
        window,
        most,
        shuffle,
        seed,
        shard_id,
        num_shards,
        threads,
        tokens,
        CAPACITY,
        0,
        True,
        cuts or Counter(),
        Counter(),
    )


def samples_in(rows, places):
    return [rows.documents(place)[0] for place in places]


def test_a_plan_has_every_sample_once_and_a_multiple_of_rows(lengths):
    order = {"shuffle": True, "seed": 1, "num_shards": 2, "shard_id": 1}
    plan, found = plan_rows(Tokens(lengths), CAPACITY, 4, order, 4, 2)
    assert found.tolist() == lengths and len(plan) % 8 == 0
    assert sorted(sample for row in plan for sample in row) == list(range(100))
    cuts, padding = Counter(), Counter()
    rows = PlannedRows(plan, Tokens(lengths), CAPACITY, 0, True, cuts, padding)
    assert len(rows) == len(plan) and samples_in(rows, range(len(plan))) == plan
    ids, _, _, _, document_ids = rows[3]
    assert [int(ids[document_ids == place][0]) for place in range(len(plan[3]))] == plan[3]
    assert cuts.calls == [(sample, lengths[sample], lengths[sample]) for sample in plan[3]]
    assert padding.calls == [(1, sum(lengths[sample] for sample in plan[3]), CAPACITY)]


def test_nothing_to_pack_is_said():
    order = {"shuffle": False, "seed": 0, "num_shards": 1, "shard_id": 0}
    with pytest.raises(InputError, match="every sample was left out"):
        plan_rows(Tokens([0, 0]), CAPACITY, 4, order, 1, 1)
    with pytest.raises(InputError, match="every sample was left out"):
        stream(Tokens([0, 0])).documents(0)


def test_a_streams_passes_have_every_sample_once(lengths):
    rows = stream(Tokens(lengths))
    places, samples = iter(range(10000)), []
    for number in range(3):
        seen = []
        while len(seen) < 100:
            seen += rows.documents(next(places))[0]
        assert sorted(seen) == list(range(100))
        samples.append(seen)
    assert samples[0] != samples[1] != samples[2]


def test_a_stream_is_read_from_any_place(lengths):
    whole = samples_in(stream(Tokens(lengths)), range(90))
    assert samples_in(stream(Tokens(lengths)), range(50, 90)) == whole[50:]
    rows = stream(Tokens(lengths), threads=1)
    assert samples_in(rows, [70, 71, 3, 4, 60]) == [whole[place] for place in (70, 71, 3, 4, 60)]
    assert samples_in(stream(Tokens(lengths), seed=1), range(90)) != whole


def test_a_forked_worker_goes_on_with_a_stream(lengths):
    """It has none of the threads that its parent began to tokenize in."""
    rows = stream(Tokens(lengths))
    samples_in(rows, [0])
    forked = multiprocessing.get_context("fork")
    found = forked.SimpleQueue()
    worker = forked.Process(target=lambda: found.put(rows.documents(50)[0]))
    worker.start()
    worker.join(30)
    stuck = worker.is_alive()
    worker.kill()
    assert not stuck and found.get() == rows.documents(50)[0]


def test_a_stream_begins_before_all_is_tokenized():
    tokens = Tokens([10] * 5000)
    stream(tokens).documents(0)
    assert len(tokens.asked) < 200


def test_ranks_of_a_stream_share_the_samples(lengths):
    seen = []
    for rank in range(3):
        rows, mine = stream(Tokens(lengths), rank, 3), []
        for place in range(200):
            if len(mine) == len(range(rank, 100, 3)):
                break
            mine += rows.documents(place)[0]
        seen += mine
    assert sorted(seen) == list(range(100))


def test_samples_that_are_left_out_are_counted(lengths):
    cuts = Counter()
    rows = stream(Tokens([0, 5, 0, 7]), cuts=cuts)
    assert sorted(rows.documents(0)[0]) == [1, 3]
    assert sorted(cuts.calls) == [(0, 99, 0), (2, 99, 0)]


def test_a_limit_of_documents_holds_in_both_ways(lengths):
    tokens = Tokens(lengths)
    rows = stream(tokens, most=2)
    assert max(len(rows.documents(place)[0]) for place in range(60)) == 2
    order = {"shuffle": True, "seed": 0, "shard_id": 0, "num_shards": 1}
    plan, _ = plan_rows(tokens, CAPACITY, 3, order, 1, 1, most=2)
    assert max(map(len, plan)) == 2 and sorted(sample for row in plan for sample in row) == list(range(100))

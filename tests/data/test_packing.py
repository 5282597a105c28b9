"""Packing: each document once, rows not too long, little padding, weights by sample."""

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from mindformers_glm32k.data.packing import (
    COLUMNS,
    PlannedSequences,
    StreamedSequences,
    first_fit,
    pack,
    packed_sequence,
    plan_sequences,
    split_to_multiple,
)
from mindformers_glm32k.errors import InputError

CAPACITY = 50
LENGTHS = strategies.lists(strategies.integers(0, CAPACITY), max_size=300)


@given(strategies.lists(strategies.integers(1, CAPACITY), max_size=60))
def test_first_fit_takes_the_first_row_with_room(lengths):
    rows = first_fit(lengths, CAPACITY)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    room = []  # the plain way
    for length in sorted(lengths, reverse=True):
        row = next((number for number, left in enumerate(room) if left >= length), None)
        if row is None:
            row = len(room)
            room.append(CAPACITY)
        room[row] -= length
    assert [CAPACITY - sum(lengths[place] for place in row) for row in rows] == room


@pytest.mark.parametrize("lengths", [[0], [51], [3, -1]])
def test_lengths_that_fit_no_row_are_refused(lengths):
    with pytest.raises(ValueError, match="do not lie between 1 and 50"):
        first_fit(lengths, CAPACITY)


@settings(deadline=None)
@given(LENGTHS, strategies.integers(1, 200), strategies.sampled_from([None, 0, (1, 2)]))
def test_each_document_is_in_one_row_and_in_one_only(lengths, window, seed):
    documents = [(1000 + number, length) for number, length in enumerate(lengths)]
    rows = list(pack(iter(documents), CAPACITY, window, seed))
    packed = [number for row in rows for number in row]
    assert sorted(packed) == [number for number, length in documents if length]
    length_of = dict(documents)
    assert all(row and sum(length_of[number] for number in row) <= CAPACITY for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert rows == list(pack(documents, CAPACITY, window, seed)), "the same each time"


@settings(deadline=None)
@given(LENGTHS, strategies.integers(1, 50), strategies.integers(1, 5))
def test_rows_have_no_more_documents_than_allowed(lengths, window, most):
    documents = list(enumerate(lengths))
    rows = list(pack(iter(documents), CAPACITY, window, max_documents=most))
    assert sorted(number for row in rows for number in row) == [number for number, length in documents if length]
    assert all(len(row) <= most and sum(lengths[number] for number in row) <= CAPACITY for row in rows)


def test_the_seed_changes_the_order_of_rows_alone():
    rng = np.random.default_rng(0)
    documents = list(enumerate(rng.integers(1, CAPACITY, 500).tolist()))
    one, two = (list(pack(documents, CAPACITY, 20, seed)) for seed in (1, 2))
    assert one != two and sorted(one) == sorted(two)


def test_rows_are_full_on_a_mix_of_long_and_short_documents():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(8.8, 0.9, 4000), 50, 32000).astype(int)  # a LongBench-like mix: 0.1k to 32k tokens
    rows = list(pack(enumerate(lengths.tolist()), 32768, 64, 0))
    assert 1 - lengths.sum() / (len(rows) * 32768) < 0.01
    first = list(pack(enumerate(lengths[:64].tolist()), 32768, 64, 0))
    assert 1 - lengths[:64].sum() / (len(first) * 32768) < 0.1  # what cannot be avoided at the very end


def test_rows_are_full_of_short_documents():
    lengths = np.random.default_rng(0).integers(20, 200, 20000)
    rows = list(pack(enumerate(lengths.tolist()), 32768, 64, 0))
    assert len(rows) == -(-lengths.sum() // 32768)


def test_a_row_is_there_after_a_small_first_window():
    asked = []

    def documents():
        for number in range(10000):
            asked.append(number)
            yield number, 10

    assert next(pack(documents(), CAPACITY, 4096)) and len(asked) == 10


@given(
    strategies.lists(strategies.lists(strategies.integers(), min_size=1, max_size=6), max_size=20),
    strategies.integers(1, 9),
)
def test_rows_are_split_until_every_rank_has_as_many(rows, multiple):
    split = split_to_multiple(rows, multiple)
    assert len(split) % multiple == 0 and len(split) - len(rows) < multiple
    assert sorted(number for row in split for number in row) == sorted(number for row in rows for number in row)
    if sum(map(len, rows)) >= len(rows) + multiple:
        assert all(split)


def document(length, learnt):
    ids = np.arange(10, 10 + length, dtype=np.int32)
    labels = np.full(length, -100, np.int32)
    labels[length - 1 - learnt : length - 1] = ids[length - learnt :]
    return SimpleNamespace(input_ids=ids, labels=labels)


def test_a_row_as_in_the_picture():
    row = packed_sequence([document(4, 1), document(3, 1), document(4, 2)], 13, 0)
    columns = dict(zip(COLUMNS, row))
    assert columns["input_ids"].tolist() == [10, 11, 12, 13, 10, 11, 12, 10, 11, 12, 13, 0, 0]
    assert columns["labels"].tolist() == [-100, -100, 13, -100, -100, 12, -100, -100, 12, 13, -100, -100, -100]
    assert columns["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert columns["document_ids"].tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 2
    assert columns["input_mask"].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0.5, 0.5, 0, 0, 0]
    assert {name: column.dtype for name, column in columns.items()} == {
        name: np.float32 if name == "input_mask" else np.int32 for name in COLUMNS
    }
    by_token = packed_sequence([document(4, 1), document(4, 2)], 8, 0, equal_samples=False)[2]
    assert by_token.tolist() == [0, 0, 1, 0, 0, 1, 1, 0]
    assert packed_sequence([], 3, 7)[0].tolist() == [7, 7, 7] and not packed_sequence([], 3, 7)[2].any()


@given(strategies.lists(strategies.integers(1, 12), min_size=1, max_size=12), strategies.randoms())
def test_the_loss_is_the_mean_over_samples_however_they_are_packed(answers, rng):
    """sum(w * l) / sum(w) over all rows, as the model has it, against the mean of the samples' means."""
    samples = [document(answer + 3, answer) for answer in answers]
    losses = [np.array([rng.random() for _ in range(answer)]) for answer in answers]
    expected = np.mean([loss.mean() for loss in losses])
    order = list(range(len(samples)))
    rng.shuffle(order)
    total = count = 0
    while order:  # rows of one to three samples, on any device
        size = rng.randint(1, 3)
        row, order = order[:size], order[size:]
        columns = dict(zip(COLUMNS, packed_sequence([samples[number] for number in row], CAPACITY, 0)))
        loss = np.zeros(CAPACITY)
        loss[columns["labels"] != -100] = np.concatenate([losses[number] for number in row])
        total += (columns["input_mask"] * loss).sum()
        count += columns["input_mask"].sum(dtype=np.float64)
    assert total / count == pytest.approx(expected, rel=1e-5)


TOKENS_A_ROW = 40


class Tokens:
    """Samples whose first token is their number."""

    def __init__(self, lengths):
        self._lengths = lengths
        self.asked = []

    def __len__(self):
        return len(self._lengths)

    def __getitem__(self, sample):
        self.asked.append(sample)
        ids = np.full(self._lengths[sample], sample, np.int32)
        return SimpleNamespace(input_ids=ids, labels=ids, tokens_before=len(ids) or 99, tokens_after=len(ids))


class Counter:
    """Stands for TruncationCounter and PaddingCounter."""

    def __init__(self):
        self.calls = []

    def add(self, *call):
        self.calls.append(call)


@pytest.fixture
def lengths():
    return np.random.default_rng(0).integers(1, TOKENS_A_ROW + 1, 100).tolist()


def stream(tokens, shard_id=0, num_shards=1, shuffle=True, seed=0, window=3, threads=2, cuts=None, most=None):
    return StreamedSequences(
        window,
        most,
        {"shuffle": shuffle, "seed": seed, "shard_id": shard_id, "num_shards": num_shards},
        threads,
        tokens,
        TOKENS_A_ROW,
        0,
        True,
        cuts or Counter(),
        Counter(),
    )


def samples_in(rows, places):
    return [rows.documents(place)[0] for place in places]


def test_a_plan_has_every_sample_once_and_a_multiple_of_rows(lengths):
    order = {"shuffle": True, "seed": 1, "num_shards": 2, "shard_id": 1}
    plan = plan_sequences(np.array(lengths), TOKENS_A_ROW, 4, order, 4)
    assert len(plan) % 8 == 0
    assert sorted(sample for row in plan for sample in row) == list(range(100))
    cuts, padding = Counter(), Counter()
    rows = PlannedSequences(plan, np.array(lengths), Tokens(lengths), TOKENS_A_ROW, 0, True, cuts, padding)
    assert len(rows) == len(plan) and samples_in(rows, range(len(plan))) == plan
    ids, _, _, _, document_ids = rows[3]
    assert [int(ids[document_ids == place][0]) for place in range(len(plan[3]))] == plan[3]
    assert cuts.calls == [(sample, lengths[sample], lengths[sample]) for sample in plan[3]]
    assert padding.calls == [(1, sum(lengths[sample] for sample in plan[3]), TOKENS_A_ROW)]


def test_other_lengths_than_were_planned_are_an_error(lengths):
    tokens = Tokens(lengths)
    tokens.samples = SimpleNamespace(location=lambda sample: f"data.jsonl, line {sample + 1}")
    planned = np.array(lengths)
    planned[7] -= 1
    rows = PlannedSequences([[3, 5], [6, 7]], planned, tokens, TOKENS_A_ROW, 0, True, Counter(), Counter())
    assert rows.documents(0)[0] == [3, 5]
    with pytest.raises(InputError, match=f"data.jsonl, line 8: {lengths[7]} tokens, and {lengths[7] - 1} when"):
        rows.documents(1)


def test_nothing_to_pack_is_said():
    order = {"shuffle": False, "seed": 0, "num_shards": 1, "shard_id": 0}
    with pytest.raises(InputError, match="every sample was left out"):
        plan_sequences(np.array([0, 0]), TOKENS_A_ROW, 4, order, 1)
    with pytest.raises(InputError, match="every sample was left out"):
        stream(Tokens([0, 0])).documents(0)


def test_a_streams_passes_have_every_sample_once(lengths):
    rows = stream(Tokens(lengths))
    places, samples = iter(range(10000)), []
    for _ in range(3):
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
    plan = plan_sequences(np.array(lengths), TOKENS_A_ROW, 3, order, 1, max_documents=2)
    assert max(map(len, plan)) == 2 and sorted(sample for row in plan for sample in row) == list(range(100))

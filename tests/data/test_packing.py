"""Packing: each document once, rows not too long, little padding, weights by sample."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from mindformers_glm32k.data.packing import COLUMNS, first_fit, pack, packed_row, split_to_multiple

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
    rows = list(pack(iter(documents), CAPACITY, window, most=most))
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
    row = packed_row([document(4, 1), document(3, 1), document(4, 2)], 13, 0)
    columns = dict(zip(COLUMNS, row))
    assert columns["input_ids"].tolist() == [10, 11, 12, 13, 10, 11, 12, 10, 11, 12, 13, 0, 0]
    assert columns["labels"].tolist() == [-100, -100, 13, -100, -100, 12, -100, -100, 12, 13, -100, -100, -100]
    assert columns["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert columns["document_ids"].tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 2
    assert columns["input_mask"].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0.5, 0.5, 0, 0, 0]
    assert {name: column.dtype for name, column in columns.items()} == {
        name: np.float32 if name == "input_mask" else np.int32 for name in COLUMNS
    }
    by_token = packed_row([document(4, 1), document(4, 2)], 8, 0, equal_samples=False)[2]
    assert by_token.tolist() == [0, 0, 1, 0, 0, 1, 1, 0]
    assert packed_row([], 3, 7)[0].tolist() == [7, 7, 7] and not packed_row([], 3, 7)[2].any()


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
        columns = dict(zip(COLUMNS, packed_row([samples[number] for number in row], CAPACITY, 0)))
        loss = np.zeros(CAPACITY)
        loss[columns["labels"] != -100] = np.concatenate([losses[number] for number in row])
        total += (columns["input_mask"] * loss).sum()
        count += columns["input_mask"].sum(dtype=np.float64)
    assert total / count == pytest.approx(expected, rel=1e-5)

"""Packed, padded and length-sorted batches through GLM32KDataset: every sample once, on any workers and ranks."""

import json
import multiprocessing
import random

import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig

from mindformers_glm32k.data import batching as batches_module
from mindformers_glm32k.data import dataset as dataset_module
from mindformers_glm32k.data.batching import WORST, TruncationCounter, TruncationReport
from mindformers_glm32k.data.dataset import GLM32KDataset
from mindformers_glm32k.data.packing import COLUMNS
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer

SAMPLES, LENGTH = 200, 64


@pytest.fixture
def section(tmp_path, small_vocab_file):
    """The train_dataset section of a YAML; answer n is the number n, questions have 1 to 12 words."""
    rng, path = np.random.default_rng(0), tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    path.write_text(
        "".join(
            json.dumps({"content": "ab " * int(rng.integers(1, 13)), "summary": str(number)}) + "\n"
            for number in range(SAMPLES)
        )
    )
    return MindFormerConfig(
        data_loader={"type": "GLM32KDataLoader", "dataset_dir": str(path), "shuffle": True},
        tokenizer={"type": "GLM32KTokenizer", "vocab_file": str(small_vocab_file)},
        max_source_length=48,
        max_target_length=15,
        seq_length=LENGTH,
        batch_size=2,
        seed=3,
    )


@pytest.fixture
def ranks(monkeypatch):
    """A function that chooses which rank of how many the next data set is for."""

    def choose(rank, number):
        monkeypatch.setattr(GLM32KDataset, "_generate_shard_info", classmethod(lambda cls: (rank, number)))

    return choose


@pytest.fixture
def log(monkeypatch):
    messages = []
    for level in ("info", "warning"):
        monkeypatch.setattr(dataset_module.logger, level, lambda text, *values: messages.append(text % values))
    return messages


def epochs(dataset, number=1):
    """Per epoch the list of batches, each a dict of arrays."""
    iterator = dataset.create_dict_iterator(num_epochs=number, output_numpy=True)
    return [list(iterator) for _ in range(number)]


def answers(batches, tokenizer):
    """The numbers that the learnt tokens spell: which samples are in the batches."""
    found = []
    for batch in batches:
        documents = batch.get("document_ids", np.zeros_like(batch["labels"]))
        for labels, ids in zip(batch["labels"], documents):
            for document in np.unique(ids[labels != -100]):
                learnt = labels[(ids == document) & (labels != -100)]
                found.append(int(tokenizer.decode(learnt[:-1])))
    return found


@pytest.fixture
def tokenizer(small_vocab_file):
    return GLM32KTokenizer(str(small_vocab_file))


@pytest.mark.parametrize(
    "more",
    [{}, {"cache_tokens": True}, {"packing_window": 2}, {"loss_weights": "token"}],
    ids=["plain", "cached", "small window", "by token"],
)
def test_packed_rows_hold_every_sample_once_in_each_epoch(section, tokenizer, log, more):
    dataset = GLM32KDataset({**section, "packing": True, **more})
    for epoch in epochs(dataset, 3):
        assert sorted(answers(epoch, tokenizer)) == list(range(SAMPLES))
        assert len(epoch) == dataset.get_dataset_size()
        for batch in epoch:
            assert list(batch) == COLUMNS and {value.shape for value in batch.values()} == {(2, LENGTH)}
            assert batch["input_mask"].dtype == np.float32
            assert ((batch["input_mask"] > 0) == (batch["labels"] != -100)).all()
            assert (batch["position_ids"] < LENGTH).all()
    weight = sum(batch["input_mask"].sum(dtype=float) for batch in epoch)
    learnt = sum((batch["labels"] != -100).sum() for batch in epoch)
    assert weight == pytest.approx(learnt if more.get("loss_weights") == "token" else SAMPLES, rel=1e-5)
    padding = [message for message in log if message.startswith("padding: ")]
    assert len(padding) == 3 and len(set(padding)) == 1 and float(padding[0].split()[1]) < 12


def test_documents_in_a_packed_row_are_the_rows_that_they_have_alone(section):
    alone = {}
    for batch in epochs(GLM32KDataset({**section, "data_loader": {**section.data_loader, "shuffle": False}}))[0]:
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            length = np.flatnonzero(labels != -100)[-1] + 2
            alone[tuple(labels[labels != -100])] = ids[:length].tolist(), labels[:length].tolist()
    seen = 0
    for batch in epochs(GLM32KDataset({**section, "packing": True}))[0]:
        for row in zip(*batch.values()):
            row = dict(zip(batch, row))
            for document in range(row["document_ids"].max() + 1):
                places = row["document_ids"] == document
                ids, labels = row["input_ids"][places], row["labels"][places]
                assert row["position_ids"][places].tolist() == list(range(places.sum()))
                if (labels != -100).any():
                    assert alone[tuple(labels[labels != -100])] == (ids.tolist(), labels.tolist())
                    seen += 1
    assert seen == SAMPLES == len(alone)


@pytest.mark.parametrize(
    "more",
    [{}, {"rows_per_epoch": 24}, {"sort_by_length": True, "pad_to_multiple_of": 8}],
    ids=["planned", "streamed", "ragged"],
)
@pytest.mark.parametrize("cached", [False, True])
def test_the_same_rows_on_any_number_of_workers(section, more, cached):
    def rows(**options):
        packing = {"packing": True} if "sort_by_length" not in more else {}
        found = epochs(GLM32KDataset({**section, **packing, **more, "cache_tokens": cached, **options}), 2)
        return [[value.tolist() for value in batch.values()] for epoch in found for batch in epoch]

    once = rows()
    assert once == rows(num_parallel_workers=2) == rows(num_parallel_workers=2, python_multiprocessing=True)
    assert once != rows(seed=4)


def test_two_ranks_see_each_sample_once(section, tokenizer, ranks):
    seen, sizes = [], set()
    for rank in range(2):
        ranks(rank, 2)
        dataset = GLM32KDataset({**section, "packing": True})
        sizes.add(dataset.get_dataset_size())
        seen.append([answers(epoch, tokenizer) for epoch in epochs(dataset, 2)])
    assert len(sizes) == 1
    for first, second in zip(*seen):
        assert sorted(first + second) == list(range(SAMPLES))
    ranks(None, None)  # one process has the rows of both
    whole = epochs(GLM32KDataset({**section, "packing": True, "batch_size": 4}))[0]
    assert len(whole) == sizes.pop()
    assert sorted(answers(whole, tokenizer)) == list(range(SAMPLES))


def test_two_ranks_of_a_stream_see_each_sample_once_in_each_pass(section, tokenizer, ranks):
    seen = []
    for rank in range(2):
        ranks(rank, 2)
        found = [
            answers(epoch, tokenizer)
            for epoch in epochs(GLM32KDataset({**section, "packing": True, "rows_per_epoch": 40}), 8)
        ]
        seen.append([number for epoch in found for number in epoch])
    for start in range(0, SAMPLES // 2 * 3, SAMPLES // 2):
        first, second = (set(part[start : start + SAMPLES // 2]) for part in seen)
        assert first | second == set(range(SAMPLES)) and len(first) + len(second) == SAMPLES


@pytest.mark.parametrize("more", [{}, {"rows_per_epoch": 24}], ids=["planned", "streamed"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_goes_on_with_the_next_row(section, more, cached):
    options = {**section, "packing": True, "cache_tokens": cached, **more}
    whole = epochs(GLM32KDataset(options), 3)
    size, done = len(whole[0]), len(whole[0]) + 3
    resumed = GLM32KDataset(options)
    resumed.set_init_step(done)  # as MindFormers' trainer does
    iterator = resumed.create_dict_iterator(num_epochs=3, output_numpy=True)
    rest = [batch for _ in range(2) for batch in iterator]
    expected = [batch for epoch in whole for batch in epoch][done:]
    assert len(rest) == len(expected) == 2 * size - 3
    for found, wanted in zip(rest, expected):
        assert all((found[name] == wanted[name]).all() for name in COLUMNS)


def test_a_stream_says_when_its_epoch_does_not_divide(section, ranks):
    ranks(0, 2)
    with pytest.raises(InputError, match="rows_per_epoch: 22 is not a multiple of batch_size=2 times 2 ranks; take 24"):
        GLM32KDataset({**section, "packing": True, "rows_per_epoch": 22})


def test_too_few_samples_for_the_ranks_are_an_error(section, ranks):
    ranks(0, 100)
    with pytest.raises(InputError, match="too few for a batch of 2 sequences on each of 100 ranks"):
        GLM32KDataset({**section, "packing": True, "data_loader": {**section.data_loader, "num_samples": 150}})


def test_batches_are_padded_to_a_multiple(section, tokenizer, log):
    plain = {**section, "batch_size": 8}
    ragged = {**plain, "pad_to_multiple_of": 8}
    found, sorted_ = (epochs(GLM32KDataset({**ragged, "sort_by_length": order}), 2) for order in (False, True))
    positions = []
    for batches in (found[0], sorted_[0], sorted_[1]):
        assert sorted(answers(batches, tokenizer)) == list(range(SAMPLES))
        shapes = [batch["input_ids"].shape for batch in batches]
        assert all(rows == 8 and length % 8 == 0 and length <= LENGTH for rows, length in shapes)
        for batch in batches:
            assert (batch["labels"][:, -9:] != -100).any(), "no more padding than the multiple"
        positions.append(sum(rows * length for rows, length in shapes))
    assert positions[1] < 0.8 * positions[0] < positions[0] < LENGTH * SAMPLES
    padding = [float(message.split()[1]) for message in log if message.startswith("padding: ")]
    assert len(padding) == 4 and padding[2] < padding[0]
    fixed = epochs(GLM32KDataset({**plain, "sort_by_length": True}))[0]
    assert sorted(answers(fixed, tokenizer)) == list(range(SAMPLES)) and fixed[0]["labels"].shape == (8, LENGTH)


def test_two_ranks_share_the_length_sorted_batches(section, tokenizer, ranks):
    def batches():
        return epochs(GLM32KDataset({**section, "sort_by_length": True, "pad_to_multiple_of": 4}))[0]

    seen = []
    for rank in range(2):
        ranks(rank, 2)
        seen.append(batches())
    assert sorted(answers(seen[0] + seen[1], tokenizer)) == list(range(SAMPLES))
    assert np.mean([abs(one["labels"].shape[1] - two["labels"].shape[1]) for one, two in zip(*seen)]) < 2


def test_samples_that_are_left_out(section, tokenizer, log):
    section.update(max_source_length=20, truncation="drop", packing=True, batch_size=1)
    planned = answers(epochs(GLM32KDataset(section))[0], tokenizer)
    assert 20 < len(planned) < SAMPLES - 20 and len(set(planned)) == len(planned)
    assert any(
        f"packing: {len(planned)} samples in" in message and f"{SAMPLES - len(planned)} samples left out" in message
        for message in log
    )
    streamed = answers(epochs(GLM32KDataset({**section, "rows_per_epoch": 500}))[0], tokenizer)
    assert sorted(streamed[: len(planned)]) == sorted(planned)
    with open(section.data_loader.dataset_dir, "w", encoding="utf-8") as file:
        file.write(json.dumps({"content": "ab " * 30, "summary": "1"}) + "\n")
    for more in ({}, {"rows_per_epoch": 4}):
        with pytest.raises((InputError, RuntimeError), match="every sample was left out"):
            epochs(GLM32KDataset({**section, **more}))


def test_lengths_that_are_kept_are_not_counted_again(section, tokenizer, monkeypatch):
    section.update(cache_tokens=True, packing=True)
    once = epochs(GLM32KDataset(section))[0]
    with monkeypatch.context() as patched:
        patched.setattr(dataset_module.SampleEncoder, "encode", None)  # would fail if it were called
        again = GLM32KDataset(section)
    for one, two in zip(once, epochs(again)[0]):
        assert all((one[name] == two[name]).all() for name in COLUMNS)
    monkeypatch.setattr(dataset_module.SampleEncoder, "encode", None)
    with pytest.raises(TypeError):  # another truncation has other tokens
        GLM32KDataset({**section, "truncation": "left"})


def test_a_changed_file_has_other_tokens(section, tokenizer, tmp_path):
    section.update(cache_tokens=True, packing=True, cache_dir=str(tmp_path / "cache"))
    epochs(GLM32KDataset(section))
    path = section.data_loader.dataset_dir
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, "summary": str(1000 + int(row["summary"]))}) + "\n")
    assert sorted(answers(epochs(GLM32KDataset(section))[0], tokenizer)) == list(range(1000, 1000 + SAMPLES))
    assert len(list((tmp_path / "cache").glob("*.lengths.npy"))) == 1, "the outdated one is gone"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"packing": "yes"}, "packing: 'yes'"),
        ({"packing": True, "sort_by_length": True}, "sort_by_length: True has no meaning with packing"),
        ({"packing": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of: 8 has no meaning with packing"),
        ({"rows_per_epoch": 8}, "rows_per_epoch: 8 has no meaning with packing: False"),
        ({"packing": True, "rows_per_epoch": 0}, "rows_per_epoch: 0"),
        ({"packing_window": 0}, "packing_window: 0"),
        ({"loss_weights": "row"}, "loss_weights: 'row' is not one of sample, token"),
        ({"cache_tokens": "yes"}, "cache_tokens: 'yes'"),
        ({"input_columns": COLUMNS}, "input_columns"),
    ],
)
def test_what_is_wrong_is_named(section, change, message):
    with pytest.raises(InputError, match=message):
        GLM32KDataset({**section, **change})


def test_padding_is_counted_by_several_processes():
    messages = []
    counter = batches_module.PaddingCounter(
        4, type("Log", (), {"info": lambda _, text, *values: messages.append(text % values)})()
    )
    for _ in range(8):
        counter.add(1, 60, 80)
    assert messages == ["padding: 25.0 % of the positions of 4 sequences (240 tokens in 320 positions)"] * 2


class Log:
    def __init__(self):
        self.lines = []

    def warning(self, text, *values):
        self.lines.append(text % values)


def place(sample):
    return f"a.jsonl, line {sample + 1}"


def test_the_first_cut_is_told_at_once_and_each_epoch_is_summed_up():
    log = Log()
    cuts = TruncationCounter(place, 4, log, "left")
    for sample, lengths in enumerate([(15, 15), (32, 15), (20, 0), (8, 8)]):
        cuts.add(sample, *lengths)
    first, summary = log.lines
    assert (
        first == "a.jsonl, line 2: truncated from 32 to 15 tokens to fit the sequence (truncation: left); "
        "a summary follows after each epoch"
    )
    assert summary == (
        "of 4 samples 1 were truncated (truncation: left) and 1 left out, 37 of 75 tokens (49.3 %); most lost, "
        "in tokens: a.jsonl, line 3: 20, left out; a.jsonl, line 2: 32 to 15"
    )
    for sample in range(4):
        cuts.add(sample, 11, 10)
    assert len(log.lines) == 3 and "of 4 samples 4 were truncated" in log.lines[2]


def test_a_row_that_comes_twice_is_named_once():
    report = TruncationReport()
    for sample in (3, 1, 3, 3):
        report.add(sample, 10 + sample, 10)
    assert report.worst == [(13, 10, 3), (11, 10, 1)] and report.truncated == 4


def test_nothing_is_said_where_nothing_is_cut():
    log = Log()
    cuts = TruncationCounter(place, 2, log)
    for sample in range(6):
        cuts.add(sample, 10, 10)
    assert log.lines == []


def test_forked_workers_count_together():
    log = Log()
    cuts = TruncationCounter(place, 9, log)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=cuts.add, args=(number, 20 + number, 10)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    cuts.add(100, 1, 1)
    assert len(log.lines) == 1, "the warning of the first cut was another process's"
    assert "of 9 samples 8 were truncated" in log.lines[0] and "a.jsonl, line 8: 27 to 10" in log.lines[0]


def test_the_worst_of_many_samples_are_kept():
    rng, whole = random.Random(0), TruncationReport()
    for sample in range(200):
        before = rng.randint(5, 50)
        after = rng.choice([before, 0, 5])
        assert whole.add(sample, before, after) == (after != before)
    assert len(whole.worst) == WORST
    assert [before - after for before, after, _ in whole.worst] == sorted(
        [before - after for before, after, _ in whole.worst], reverse=True
    )

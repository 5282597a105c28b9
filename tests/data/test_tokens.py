"""Samples as tokens, in threads; their lengths, kept on disk and shared by ranks."""

import json
import logging
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mindformers_glm32k.data import tokens as tokens_module
from mindformers_glm32k.data.encode import SampleEncoder
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.data.tokens import TokenizedSamples, all_lengths, in_order, kept_lengths
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer

LOG = logging.getLogger("test")


@pytest.fixture(scope="module")
def tokenizer(small_vocab_file):
    return GLM32KTokenizer(str(small_vocab_file))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"content": "ab " * (n % 17 + 1), "summary": f"{n}"}) + "\n" for n in range(300))
    )
    return SampleSource(str(path))


def made(source, tokenizer):
    return TokenizedSamples(source, SampleEncoder(tokenizer, 40, 15, 60), tokenizer)


def kept(source, tokenizer, configured=True, section=None, cache_dir=None, **settings):
    section = {} if section is None else section
    return kept_lengths(source, tokenizer, {"sequence_length": 60, **settings}, section, configured, cache_dir, LOG)


def name_of(lengths):
    return Path(lengths.filename).name


@pytest.fixture
def expected(source, tokenizer):
    tokens = made(source, tokenizer)
    return [len(tokens[sample].input_ids) for sample in range(300)]


def test_what_is_known_is_not_counted_again(source, tokenizer, expected, monkeypatch):
    tokens = made(source, tokenizer)
    assert all_lengths(tokens, 2).tolist() == expected
    assert all_lengths(tokens, 2, 100, kept(source, tokenizer)).tolist() == expected
    monkeypatch.setattr(SampleEncoder, "encode", None)
    assert all_lengths(tokens, 1, 0, kept(source, tokenizer)).tolist() == expected


def test_an_interrupted_count_goes_on(source, tokenizer, expected, monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK", 10)
    tokens, asked = made(source, tokenizer), []
    make = tokens._encoder.encode

    def until_200(sample):
        asked.append(sample)
        if len(asked) == 200:
            raise KeyboardInterrupt
        return make(sample)

    monkeypatch.setattr(tokens._encoder, "encode", until_200)
    with pytest.raises(KeyboardInterrupt):
        all_lengths(tokens, 1, 0, kept(source, tokenizer))
    assert (kept(source, tokenizer) > 0).sum() == 190
    assert all_lengths(tokens, 1, 0, kept(source, tokenizer)).tolist() == expected
    assert len(asked) == 200 + 110


def test_samples_without_tokens_are_known_too(source, tokenizer):
    builder = SampleEncoder(tokenizer, 40, 15, 60, truncation="drop")
    lengths = kept(source, tokenizer)
    found = all_lengths(TokenizedSamples(source, builder, tokenizer), 1, 0, lengths)
    assert found.min() == 0 and lengths.min() == 1 and found.dtype == np.int32


def test_two_ranks_share_the_work(source, tokenizer, expected, monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK", 4)
    ranks = [made(source, tokenizer) for _ in range(2)]
    counts = [0, 0]
    for rank, tokenized in enumerate(ranks):
        make = tokenized._encoder.encode

        def tokens(sample, rank=rank, make=make):
            counts[rank] += 1
            time.sleep(0.001)
            return make(sample)

        monkeypatch.setattr(tokenized._encoder, "encode", tokens)
    found = [None, None]

    def work(rank):
        found[rank] = all_lengths(ranks[rank], 1, 150 * rank, kept(source, tokenizer))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].tolist() == found[1].tolist() == expected
    assert sum(counts) < 400 and min(counts) > 50


def _count(path, start):
    lengths = np.load(path, mmap_mode="r+")
    lengths[start::4] = np.arange(start, len(lengths), 4) % 50 + 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_write(source, tokenizer, method):
    lengths = kept(source, tokenizer)
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=_count, args=(lengths.filename, start)) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (lengths == np.arange(300) % 50 + 1).all(), "seen without opening it again"


def test_whoever_comes_second_takes_the_file_that_is_there(source, tokenizer, monkeypatch):
    """Two ranks find none and make one each: both must go on with the same."""
    path = Path(kept(source, tokenizer).filename)
    path.unlink()
    tokens_module._make(path, 300)
    first = np.load(path, mmap_mode="r+")
    tokens_module._make(path, 300)
    first[7] = 5
    assert kept(source, tokenizer)[7] == 5
    assert [file.name for file in path.parent.glob("*.npy")] == [path.name], "no drafts are left"


@pytest.mark.parametrize("change", ["settings", "loader", "vocabulary", "code", "data"])
def test_what_the_lengths_depend_on(source, tokenizer, change, train_vocabulary, monkeypatch, tmp_path):
    before = kept(source, tokenizer)
    assert name_of(kept(source, tokenizer, section={"shuffle": True, "seed": 3, "num_shards": 2})) == name_of(before)
    if change == "settings":
        after = kept(source, tokenizer, truncation="left")
    elif change == "loader":
        after = kept(source, tokenizer, section={"origin_columns": ["content", "summary"]})
    elif change == "vocabulary":
        after = kept(source, GLM32KTokenizer(str(train_vocabulary(vocab_size=390))))
    elif change == "code":
        monkeypatch.setattr(tokens_module, "_code", lambda: "other")
        after = kept(source, tokenizer)
    else:
        path = tmp_path / "data.jsonl"
        path.write_text(path.read_text().replace("ab ab ab", "ab ab ba"))
        after = kept(source, tokenizer)
    assert name_of(after) != name_of(before)
    assert Path(before.filename).exists() == (change != "data"), "that of another state of the data is removed"


@pytest.mark.parametrize(
    "damage", ["shorter", "half a header", "empty", "other size", "other type", "too long", "gone"]
)
def test_damaged_lengths_are_counted_again(source, tokenizer, expected, damage):
    lengths = kept(source, tokenizer)
    all_lengths(made(source, tokenizer), 1, 0, lengths)
    path, raw = Path(lengths.filename), Path(lengths.filename).read_bytes()
    path.unlink()  # the old one stays mapped
    if damage in ("shorter", "half a header", "empty"):
        path.write_bytes(raw[: {"shorter": -8, "half a header": 20, "empty": 0}[damage]])
    elif damage != "gone":
        other = {
            "other size": lengths[:-1],
            "other type": lengths.astype(np.int64),
            "too long": np.where(np.arange(300) == 7, 62, lengths).astype(np.int32),
        }
        np.save(path, other[damage])
    again = kept(source, tokenizer)
    assert (again == 0).sum() == {"shorter": 2}.get(damage, 300)
    assert all_lengths(made(source, tokenizer), 1, 0, again).tolist() == expected
    assert path.read_bytes() == raw


def test_little_data_and_finished_loaders_keep_nothing(source, tokenizer, tmp_path, monkeypatch):
    assert kept(source, tokenizer, None) is None and kept(source, tokenizer, False) is None
    assert kept_lengths(source, tokenizer, {"sequence_length": 60}, None, True, None, LOG) is None
    assert not (tmp_path / ".glm32k_cache").exists()
    monkeypatch.setattr(tokens_module, "KEPT_FROM", 100)
    assert kept(source, tokenizer, None) is not None


def test_a_folder_that_cannot_be_made_is_no_end(source, tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert kept(source, tokenizer, cache_dir=tmp_path / "file" / "cache") is None
    assert "are not kept" in caplog.text


def test_a_full_disk_is_no_end(source, tokenizer, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert kept(source, tokenizer) is None and "No space left on device" in caplog.text
    assert not list((tmp_path / ".glm32k_cache").glob("*.npy"))


def test_errors_have_their_place(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"content": "a", "summary": "b"}\n{"content": "a", "summary": "' + "b " * 100 + '"}\n')
    with pytest.raises(InputError, match="data.jsonl, line 2: answers, role tokens"):
        made(SampleSource(str(path)), tokenizer)[1]


def test_results_come_in_order_and_some_are_computed_ahead():
    begun = []

    def slow(item):
        begun.append(item)
        time.sleep(0.01 * (item % 3))
        return item * item

    results = in_order(slow, iter(range(50)), threads=4, ahead=8)
    assert next(results) == 0
    time.sleep(0.2)
    assert sorted(begun) == list(range(9))
    assert [0, *results] == [item * item for item in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // item, [1, 0, 1], threads=2, ahead=1))


def test_what_is_left_behind_is_not_waited_for():
    """The garbage collector closes a generator wherever it happens to run, also where threading holds its locks."""
    go_on, begun = threading.Event(), []

    def work(item):
        begun.append(item)
        assert item == 0 or go_on.wait(60)
        return item

    results = in_order(work, range(9), threads=2, ahead=2)
    assert next(results) == 0
    closing = threading.Thread(target=results.close)
    closing.start()
    closing.join(20)
    waits = closing.is_alive()
    go_on.set()
    assert not waits and len(begun) <= 4  # what had not begun never does


def test_numbers_of_numpy_are_taken(source, tokenizer):
    assert len(made(source, tokenizer)[int(np.int64(3))].input_ids) > 5

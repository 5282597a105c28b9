"""Samples as tokens: cached or not, in threads, shared by ranks."""

import json
import logging
import threading
import time

import numpy as np
import pytest

from mindformers_glm32k.data import tokens as tokens_module
from mindformers_glm32k.data.encode import RowBuilder
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.data.tokens import TokenizedSamples, in_order, token_cache
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


def made(source, tokenizer, cached=True, section=None, **settings):
    builder = RowBuilder(tokenizer, 40, 15, 60)
    cache = token_cache(source, tokenizer, settings, {} if section is None else section, cached, None, LOG)
    return TokenizedSamples(source, builder, tokenizer, cache)


def test_the_cache_changes_nothing(source, tokenizer):
    plain, cached, again = (made(source, tokenizer, cached) for cached in (False, True, True))
    assert plain.cache is None and cached.cache.folder == again.cache.folder
    for sample in (0, 299, 16, 0):
        for one, two in ((plain[sample], cached[sample]), (plain[sample], again[sample])):
            assert one.input_ids.tolist() == two.input_ids.tolist() and one.labels.tolist() == two.labels.tolist()
            assert (one.tokens_before, one.seams) == (two.tokens_before, two.seams)
    assert (again.cache.lengths() >= 0).sum() == 3


def test_all_lengths_and_what_is_known_is_not_made_again(source, tokenizer, monkeypatch):
    expected = [len(made(source, tokenizer, False)[sample].input_ids) for sample in range(300)]
    for cached in (False, True):
        assert made(source, tokenizer, cached).all_lengths(2, start=100).tolist() == expected
    monkeypatch.setattr(RowBuilder, "tokens", None)
    assert made(source, tokenizer).all_lengths(1).tolist() == expected


def test_two_ranks_share_the_work_through_the_cache(source, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK", 4)
    ranks = [made(source, tokenizer) for _ in range(2)]
    counts = [0, 0]
    for rank, tokenized in enumerate(ranks):
        make = tokenized._builder.tokens

        def tokens(sample, rank=rank, make=make):
            counts[rank] += 1
            time.sleep(0.001)
            return make(sample)

        monkeypatch.setattr(tokenized._builder, "tokens", tokens)
    found = [None, None]

    def work(rank):
        found[rank] = ranks[rank].all_lengths(1, start=150 * rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found[0] == found[1]).all() and (found[0] > 0).all()
    assert sum(counts) < 400 and min(counts) > 50


@pytest.mark.parametrize("change", ["settings", "loader", "vocabulary", "code", "data"])
def test_what_the_cache_depends_on(source, tokenizer, change, train_vocabulary, monkeypatch, tmp_path):
    before = made(source, tokenizer).cache.folder
    assert made(source, tokenizer, section={"shuffle": True, "seed": 3, "num_shards": 2}).cache.folder == before
    if change == "settings":
        after = made(source, tokenizer, truncation="left").cache.folder
    elif change == "loader":
        after = made(source, tokenizer, section={"origin_columns": ["content", "summary"]}).cache.folder
    elif change == "vocabulary":
        after = made(source, GLM32KTokenizer(str(train_vocabulary(vocab_size=390)))).cache.folder
    elif change == "code":
        monkeypatch.setattr(tokens_module, "_code", lambda: "other")
        after = made(source, tokenizer).cache.folder
    else:
        path = tmp_path / "data.jsonl"
        path.write_text(path.read_text().replace("ab ab ab", "ab ab ba"))
        after = made(source, tokenizer).cache.folder
    assert after != before


def test_little_data_and_finished_loaders_have_no_cache(source, tokenizer, tmp_path, monkeypatch):
    assert made(source, tokenizer, cached=None).cache is None
    assert token_cache(source, tokenizer, {}, None, True, None, LOG) is None
    assert not (tmp_path / ".glm32k_cache").exists()
    monkeypatch.setattr(tokens_module, "CACHED_FROM", 100)
    assert made(source, tokenizer, cached=None).cache is not None


def test_a_folder_that_cannot_be_made_is_no_end(source, tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert token_cache(source, tokenizer, {}, {}, True, tmp_path / "file" / "cache", LOG) is None
    assert "tokens are not cached" in caplog.text


def test_errors_have_their_place(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"content": "a", "summary": "b"}\n{"content": "a", "summary": "' + "b " * 100 + '"}\n')
    with pytest.raises(InputError, match="data.jsonl, line 2: answers, role tokens"):
        made(SampleSource(str(path)), tokenizer, False)[1]


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

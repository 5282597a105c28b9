"""The token cache: what comes back, interruptions, damage, several processes."""

import json
import logging
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from mindformers_glm32k.data.encode import Row
from mindformers_glm32k.data.token_cache import RECORD, TokenCache, remove_outdated

LOG = logging.getLogger("test")


def row(sample, length=None, learnt=()):
    rng = np.random.default_rng(sample)
    ids = rng.integers(0, 60000, 5 + sample % 50 if length is None else length).astype(np.int32)
    labels = np.full(len(ids), -100, np.int32)
    for start, stop in learnt or ([(len(ids) // 2, len(ids) - 1)] if len(ids) > 2 else ()):
        labels[start:stop] = ids[start + 1 : stop + 1]
    return Row(ids, labels, tokens_before=len(ids) + 3, tokens_after=len(ids), prompt_tokens=2, seams=(1, 4))


def same(one, two):
    return (one.input_ids.tolist(), one.labels.tolist()) == (two.input_ids.tolist(), two.labels.tolist()) and all(
        getattr(one, name) == getattr(two, name) for name in ("tokens_before", "tokens_after", "seams", "dropped")
    )


def cache(folder, size=100, vocabulary=65000, **key):
    return TokenCache(folder, "data", {"what": 1, **key}, size, vocabulary, LOG)


def test_rows_come_back(tmp_path):
    one = cache(tmp_path)
    assert one.get(3) is None and (one.lengths() == -1).all()
    rows = {sample: row(sample) for sample in (3, 0, 99, 41)}
    for sample, made in rows.items():
        one.put(sample, made)
    for reader in (one, cache(tmp_path), pickle.loads(pickle.dumps(one))):
        assert all(same(reader.get(sample), made) for sample, made in rows.items())
        assert reader.get(4) is None
        lengths = reader.lengths()
        assert {sample: lengths[sample] for sample in rows} == {n: len(made.input_ids) for n, made in rows.items()}
        assert (lengths >= 0).sum() == 4
    assert one.get(3).labels.dtype == one.get(3).input_ids.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(strategies.lists(strategies.booleans(), max_size=40), strategies.sampled_from([1 << 16, 1 << 17]))
def test_any_labels_come_back(tmp_path_factory, learnt, vocabulary):
    ids = np.arange(100, 101 + len(learnt), dtype=np.int32) + (vocabulary - 65536)
    labels = np.full(len(ids), -100, np.int32)
    for place, is_learnt in enumerate(learnt):
        labels[place] = ids[place + 1] if is_learnt else -100
    made = Row(ids, labels, len(ids), len(ids), 1)
    one = cache(tmp_path_factory.mktemp("cache"), vocabulary=vocabulary)
    one.put(7, made)
    assert same(one.get(7), made)


def test_rows_with_other_labels_are_not_kept(tmp_path):
    one, made = cache(tmp_path), row(1)
    made.labels[1] = made.input_ids[2] + 1
    one.put(1, made)
    last = row(2)
    last.labels[-1] = 5
    one.put(2, last)
    assert one.get(1) is None and one.get(2) is None


def test_rows_without_tokens(tmp_path):
    one = cache(tmp_path)
    dropped = Row(np.zeros(0, np.int32), np.zeros(0, np.int32), 500, 0, 400, (), "too long")
    one.put(5, dropped)
    assert same(one.get(5), dropped) and one.lengths()[5] == 0


def test_each_key_has_a_cache_of_its_own(tmp_path):
    cache(tmp_path).put(1, row(1))
    assert cache(tmp_path, what=2).get(1) is None
    assert cache(tmp_path).get(1) is not None


def test_caches_of_changed_files_are_removed(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    state = os.stat(data)
    files = [[str(data), state.st_size, state.st_mtime_ns]]
    kept, other = cache(tmp_path / "c", files=files), cache(tmp_path / "c", what=2)
    outdated = cache(tmp_path / "c", files=[[str(data), state.st_size, 5]])
    gone = cache(tmp_path / "c", files=[*files, [str(tmp_path / "missing"), 1, 5]])
    assert remove_outdated(tmp_path / "c") == sorted([outdated.folder.name, gone.folder.name])
    assert kept.folder.is_dir() and other.folder.is_dir() and not gone.folder.exists()


@pytest.mark.parametrize(
    "damage", ["tokens", "record", "shorter segment", "no segment", "shorter table", "no table", "key"]
)
def test_damage_is_noticed_and_mended(tmp_path, damage):
    one = cache(tmp_path)
    for sample in range(100):
        one.put(sample, row(sample))
    folder, segment = one.folder, next(one.folder.glob("segment-*"))
    del one
    if damage == "tokens":
        raw = bytearray(segment.read_bytes())
        raw[40] ^= 1
        segment.write_bytes(raw)
    elif damage == "record":
        table = np.memmap(folder / "table", RECORD, "r+")
        table["tokens"][0] += 1
        table["offset"][1] += 8
        table[2] = table[3]
        table.flush()
    elif damage == "shorter segment":
        os.truncate(segment, segment.stat().st_size - 3)
    elif damage == "no segment":
        segment.unlink()
    elif damage == "shorter table":
        os.truncate(folder / "table", 10 * RECORD.itemsize + 7)
    elif damage == "no table":
        (folder / "table").unlink()
    else:
        (folder / "key.json").write_text("{")
    again = cache(tmp_path)
    found = [again.get(sample) for sample in range(100)]
    missing = [sample for sample in range(100) if found[sample] is None]
    expected = {
        "key": [],
        "tokens": [0],
        "record": [0, 1, 2],
        "shorter segment": [99],
        "shorter table": list(range(10, 100)),
    }
    assert missing == expected.get(damage, list(range(100)))
    assert all(same(found[sample], row(sample)) for sample in range(100) if sample not in missing)
    for sample in missing:
        again.put(sample, row(sample))
    assert all(same(cache(tmp_path).get(sample), row(sample)) for sample in range(100))


def _write(one, samples):
    for sample in samples:
        one.put(sample, row(sample))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_write(tmp_path, method):
    one = cache(tmp_path)
    one.put(0, row(0))
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=_write, args=(one, range(start, 100, 3))) for start in range(1, 4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    one.put(0, row(0))
    assert all(same(one.get(sample), row(sample)) for sample in range(100)), "seen without opening it again"
    assert len(list(one.folder.glob("segment-*"))) == 4


def test_a_full_disk_is_no_end(tmp_path, monkeypatch, caplog):
    one = cache(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    one.put(1, row(1))
    assert "No space left on device" in caplog.text and one.get(1) is None
    assert json.loads((one.folder / "key.json").read_text())["samples"] == 100

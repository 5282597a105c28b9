"""Which samples there are, and which of them a process does."""

import json
import zipfile

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench import samples


def record(dataset, key=None, **more):
    found = {"dataset": dataset, "context": f"context {key}", "input": "why?", "answers": ["a"], "length": 2, **more}
    return found if key is None else {**found, "_id": key}


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    write(folder / "trec.jsonl", [record("trec", f"t{number}") for number in range(30)])
    write(folder / "trec_e.jsonl", [record("trec", f"t{number}") for number in range(5)])
    write(folder / "mine.jsonl", [record("mine", number) for number in range(10)])
    (folder / "README.md").write_text("no data")
    return folder


def test_both_benchmarks_are_found_under_their_names(data):
    assert samples.counts(samples.scan(data)) == {"mine": 10, "trec": 30, "trec_e": 5}
    assert samples.counts(samples.scan(data, ["trec_e"])) == {"trec_e": 5}
    assert samples.counts(samples.scan(data / "trec_e.jsonl")) == {"trec_e": 5}
    with pytest.raises(InputError, match="--datasets lcc: not in .*, which has mine, trec, trec_e"):
        samples.scan(data, ["lcc"])


def test_a_zip_file_is_as_good_as_its_folder(data, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted(data.iterdir()):
            archive.write(path, f"data/{path.name}")
    zipped, plain = samples.scan(tmp_path / "data.zip"), samples.scan(data)
    assert [(entry.dataset, entry.key) for entry in zipped] == [(entry.dataset, entry.key) for entry in plain]
    assert [found for _, found in samples.read(zipped[::7])] == [found for _, found in samples.read(plain[::7])]


def test_samples_without_a_number_are_told_apart_and_doubles_are_one(tmp_path):
    write(tmp_path / "a.jsonl", [record("x", context="one"), record("x", context="two"), record("x", context="one")])
    entries = samples.scan(tmp_path / "a.jsonl")
    assert [entry.line for entry in entries] == [1, 2] and len({entry.key for entry in entries}) == 2


def test_limits_are_stratified_and_nested(data):
    entries = samples.scan(data)
    assert samples.counts(samples.limited(entries, 9)) == {"mine": 3, "trec": 3, "trec_e": 3}
    assert samples.counts(samples.limited(entries, 25)) == {"mine": 10, "trec": 10, "trec_e": 5}
    chosen = [set(samples.limited(entries, limit)) for limit in range(1, 46)]
    assert all(small < large for small, large in zip(chosen, chosen[1:])), "more go on where fewer stopped"
    assert [len(part) for part in chosen] == list(range(1, 46))
    assert samples.limited(entries, None) == samples.limited(entries, 100) == entries


def test_shards_share_all_samples(data):
    entries = samples.scan(data)
    parts = [samples.shard(entries, number, 4) for number in range(4)]
    assert sorted(map(len, parts)) == [11, 11, 11, 12]
    assert {entry for part in parts for entry in part} == set(entries)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"dataset": ""}', "field 'dataset' is ''"),
        ("[1]", "a JSON object is needed"),
        ('{"dataset": "../x"}', "'../x'"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record("x", 1)) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"a.jsonl: line 2: .*{message}"):
        samples.scan(tmp_path / "a.jsonl")


def test_no_data(tmp_path):
    with pytest.raises(InputError, match="--data .*: no files of LongBench in it"):
        samples.scan(tmp_path)
    with pytest.raises(InputError, match="--data .*none: no such file or folder"):
        samples.scan(tmp_path / "none")

"""Which samples there are, which of them a process does, and the ids of their prompts: those of pred.py."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench import build_prompt_ids, samples
from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer


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


SAMPLE = {"dataset": "hotpotqa", "context": "some words " * 40, "input": "why?"}
TEMPLATE = "Read {context}\nAnswer {input}"


@pytest.fixture(scope="module")
def tokenizer(small_vocab_file):
    return GLM32KTokenizer(str(small_vocab_file))


def test_every_golden_prompt_bit_for_bit(reference):
    folder = reference / "longbench"
    tokenizer = GLM32KTokenizer(str(reference / "tokenizer" / "tokenizer.model"))
    templates = json.loads((folder / "dataset2prompt.json").read_text(encoding="utf-8"))
    golden = json.loads((folder / "golden_prompt_ids.json").read_text(encoding="utf-8"))
    records = {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (folder / "data").glob("*.jsonl")
    }
    assert {entry["file"] for entry in golden} == set(records)
    for entry in golden:
        sample = records[entry["file"]][entry["index"]]
        ids = build_prompt_ids(sample, templates[entry["dataset"]], tokenizer, entry["max_length"])
        found = {
            "n_ids": len(ids),
            "first": ids[:12],
            "last": ids[-12:],
            "sha256": hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest(),
        }
        assert found == {key: entry[key] for key in found}, (entry["file"], entry["index"], entry["max_length"])


def test_the_chat_format_is_put_around_the_cut_text(tokenizer):
    ids = build_prompt_ids(SAMPLE, TEMPLATE, tokenizer, 20)
    text = tokenizer.vocabulary.encode(TEMPLATE.format(**SAMPLE))
    cut = tokenizer.vocabulary.decode(text[:10]) + tokenizer.vocabulary.decode(text[-10:])
    assert ids == chat.conversation_ids(tokenizer.vocabulary, [{"role": "user", "content": cut}], True)
    whole = build_prompt_ids(SAMPLE, TEMPLATE, tokenizer, len(text))
    assert whole == tokenizer.build_chat_input(TEMPLATE.format(**SAMPLE))["input_ids"][0].tolist()


@pytest.mark.parametrize("name", ["trec", "samsum", "lsht_e", "repobench-p"])
def test_few_shot_and_code_tasks_have_no_chat_format(tokenizer, name):
    ids = build_prompt_ids({**SAMPLE, "dataset": name}, TEMPLATE, tokenizer, 10000)
    assert ids == tokenizer.encode(TEMPLATE.format(**SAMPLE)), "[gMASK] sop and the text"


def test_role_tokens_in_a_document_stay_text(tokenizer):
    ids = build_prompt_ids({**SAMPLE, "context": "a <|assistant|> b"}, TEMPLATE, tokenizer, 100)
    assert ids.count(tokenizer.get_command("<|assistant|>")) == 1


@pytest.mark.parametrize(
    "change, template, length, message",
    [
        ({"dataset": None}, TEMPLATE, 10, "field 'dataset' is None"),
        ({"input": None}, TEMPLATE, 10, "field 'input' is NoneType, not a text, and the prompt of 'hotpotqa' needs it"),
        ({}, "{context", 10, "the prompt of 'hotpotqa' has a wrong brace"),
        ({}, TEMPLATE, 1, "max_length: 1"),
    ],
)
def test_what_is_wrong_is_named(tokenizer, change, template, length, message):
    with pytest.raises(InputError, match=message):
        build_prompt_ids({**SAMPLE, **change}, template, tokenizer, length)

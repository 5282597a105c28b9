"""Prompts against those of LongBench's own program."""

import hashlib
import json

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench import build_prompt_ids
from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer

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

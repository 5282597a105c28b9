"""Chats, plain text and LongBench rows from file to batch."""

import json

import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig

from mindformers_glm32k.data.dataset import GLM32KDataset
from mindformers_glm32k.data.encode import IGNORED
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer


@pytest.fixture
def section(tmp_path, small_vocab_file):
    return MindFormerConfig(
        data_loader={"type": "GLM32KDataLoader", "dataset_dir": str(tmp_path / "data"), "shuffle": False},
        tokenizer={"type": "GLM32KTokenizer", "vocab_file": str(small_vocab_file)},
        input_columns=["input_ids", "labels"],
        max_source_length=60,
        max_target_length=39,
        batch_size=1,
    )


def rows(section, tmp_path, **files):
    (tmp_path / "data").mkdir(exist_ok=True)
    for name, records in files.items():
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = GLM32KDataset(section)
    return [
        (row["input_ids"][0], row["labels"][0]) for row in dataset.create_dict_iterator(num_epochs=1, output_numpy=True)
    ]


def test_every_answer_of_a_chat_and_all_of_a_text_is_learnt(section, tmp_path, small_vocab_file):
    tokenizer = GLM32KTokenizer(str(small_vocab_file))
    turns = [("user", "q"), ("assistant", "one"), ("user", "word " * 100), ("assistant", "two")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = rows(section, tmp_path, a=[chat], b=[{"text": "once upon"}], c=[{"content": "q", "summary": "a"}])
    texts = [tokenizer.decode(labels[labels != IGNORED]).replace(" ", "") for _, labels in found]
    assert texts == ["\none<|user|>\ntwo", "onceupon", "\na"]
    assert all(len(ids) == 100 for ids, _ in found), "the cut chat fills its row"
    assert (found[0][0] != tokenizer.pad_token_id).all()
    assert np.flatnonzero(found[1][1] != IGNORED)[0] == 1


ANSWERS = [
    {"content": "q", "summary": "word " * 200},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 200}]},
    {"messages": [{"role": role, "content": "tin"} for _ in range(40) for role in ("user", "assistant")]},
    {"system": "word " * 200, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {
        "tools": [{"a": {"b": {"c": {"d": [1] * 9}}}}] * 9,
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    },
]


@pytest.mark.parametrize("record", ANSWERS)
@pytest.mark.parametrize("options", [{}, {"packing": True}, {"packing": True, "rows_per_epoch": 2}])
def test_an_answer_that_no_row_holds_is_named_with_its_line_before_the_first_step(section, tmp_path, record, options):
    short = {"content": "q", "summary": "a"} if "content" in record else {"messages": ANSWERS[2]["messages"][:2]}
    (tmp_path / "data").mkdir()
    lines = [short] * 5 + [record]
    (tmp_path / "data" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section.update(options)
    with pytest.raises(InputError, match="a.jsonl, line 6: answers, role tokens and system messages") as error:
        GLM32KDataset(section)
    assert "\n" not in str(error.value)
    section.on_long_answer = "drop"
    GLM32KDataset(section)


def test_long_documents_with_short_answers_are_no_long_answers(section, tmp_path):
    records = [{"content": "word " * 500, "summary": "a"}, {"text": "word " * 500}]
    assert len(rows(section, tmp_path, a=records[:1], b=records[1:])) == 2


@pytest.mark.parametrize(
    "name, kind, ours",
    [
        ("data_loader", "ADGenDataLoader", "GLM32KDataLoader"),
        ("tokenizer", "ChatGLM32kTokenizer", "GLM32KTokenizer"),
        ("tokenizer", "ChatGLM3Tokenizer", "GLM32KTokenizer"),
    ],
)
def test_classes_of_other_models_are_named_with_ours(section, name, kind, ours):
    section[name]["type"] = kind
    with pytest.raises(InputError, match=f"{name}.type: {kind} does not serve GLM32KDataset; use {ours}"):
        GLM32KDataset(section)


def test_damaged_lines_are_skipped_by_choice(section, tmp_path):
    records = [{"content": "q", "summary": "a"}, {"content": "q"}, {"content": "q", "summary": "b"}]
    with pytest.raises(InputError, match="a.jsonl: line 2: column 'summary' is missing"):
        rows(section, tmp_path, a=records)
    section.data_loader.on_error = "skip"
    assert len(rows(section, tmp_path, a=records)) == 2

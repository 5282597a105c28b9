"""Questions: the conversations of all kinds of files."""

import json

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.questions import QuestionFile, fitted_ids, messages_of, prompt_ids
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

USER = {"role": "user", "metadata": "", "content": "q"}


@pytest.fixture(scope="module")
def vocabulary(small_vocab_file):
    return Vocabulary(small_vocab_file)


@pytest.mark.parametrize(
    "record, roles, last",
    [
        ({"prompt": "q"}, "user", "q"),
        ({"prompt": "q", "system": "s"}, "system user", "q"),
        ({"prompt": "q", "history": [["a", "b"]]}, "user assistant user", "q"),
        ({"content": "q", "summary": "a", "context_span": [0, 1], "dataset": "x"}, "user", "q"),
        ({"instruction": "do", "input": "it", "output": "x"}, "user", "do\nit"),
        ({"messages": [USER]}, "user", "q"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "user", "q"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "weather?"},
                    {"role": "assistant", "metadata": "get", "content": "tool_call()"},
                    {"role": "observation", "content": "rain"},
                ]
            },
            "system user assistant observation",
            "rain",
        ),
        ({"prompt": "q", "tools": [{"name": "t"}]}, "system user", "q"),
    ],
)
def test_records_become_conversations(record, roles, last):
    messages = messages_of(record)
    assert [message["role"] for message in messages] == roles.split()
    assert messages[-1]["content"] == last
    if "tools" in record:
        assert '"name": "t"' in messages[0]["content"]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"promt": "q"}, "has the fields 'promt'; needed are messages"),
        ({"context": "c", "input": "i"}, "glm32k longbench predict"),
        ({"prompt": " "}, "column 'prompt' is empty"),
        ({"prompt": 3}, "column 'prompt' is int"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "role assistant, which asks for nothing"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "pirate", "content": "a"}]}, "role is 'pirate'"),
    ],
)
def test_what_asks_for_nothing_is_named(record, message):
    with pytest.raises(InputError, match=message):
        messages_of(record)


def test_files_of_records_and_of_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "_id": 7}\n{"prompt": "r"}\n')
    file = QuestionFile(tmp_path / "a.jsonl")
    assert [file.names(0), file.names(1)] == [{"_id": 7}, {"line": 2}] and file[1][0]["content"] == "r"
    (tmp_path / "array.json").write_text(json.dumps([{"prompt": "q"}, {"prompt": "r"}]))
    assert [message["content"] for index in (0, 1) for message in QuestionFile(tmp_path / "array.json")[index]] == [
        "q",
        "r",
    ]
    for name in ("text.txt", "text"):
        (tmp_path / name).write_text("第一个问题\n\nsecond\\nline\n", encoding="utf-8")
        file = QuestionFile(tmp_path / name)
        assert [file[index][0]["content"] for index in range(len(file))] == ["第一个问题", "second\nline"]
        assert file.names(1) == {"line": 2}


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"prompt": "a"}\n{"promt": "b"}\n{"prompt": \n', r"line 2: has the fields .*line 3: broken JSON"),
        (b'{"prompt": "a", "_id": 1}\n{"prompt": "b", "_id": "1"}\n', "line 2: the _id .* is that of .*line 1, too"),
        (b"", "the file is empty"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        QuestionFile(tmp_path / "a.jsonl")


def test_the_middle_is_left_out_as_pred_py_does(vocabulary):
    """Of one prompt: its first and last half, decoded and tokenized again, in the chat format."""
    text = "one two three four five six seven eight nine ten " * 8
    messages = [{"role": "user", "content": text}]
    around = len(prompt_ids(vocabulary, [{"role": "user", "content": ""}]))
    ids, room = vocabulary.encode(text), 60 + around
    halves = vocabulary.decode(ids[:30]) + vocabulary.decode(ids[-30:])
    wanted = prompt_ids(vocabulary, [{"role": "user", "content": halves}])
    found = fitted_ids(vocabulary, messages, room)
    assert len(found) <= room
    if len(wanted) <= room:
        assert found == wanted
    assert fitted_ids(vocabulary, messages, 10_000) == prompt_ids(vocabulary, messages)


def test_systems_and_answers_are_not_truncated(vocabulary):
    messages = [
        {"role": "system", "content": "be brief " * 10},
        {"role": "user", "content": "document " * 300},
        {"role": "assistant", "content": "an answer " * 5},
        {"role": "user", "content": "and now?"},
    ]
    text = vocabulary.decode(fitted_ids(vocabulary, messages, 250))
    assert "be brief " * 10 in text and "an answer " * 5 in text and "and now?" in text
    with pytest.raises(InputError, match=r"alone have \d+ tokens, 40 fit"):
        fitted_ids(vocabulary, messages, 40)

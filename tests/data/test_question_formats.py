"""Alpaca's records, and query with response; what is not used of a file is named."""

import json

import pytest

from mindformers_glm32k.data.formats import Sample, Turn
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.errors import InputError


def source(tmp_path, *records, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return SampleSource(path, **options)


@pytest.mark.parametrize("columns", [("content", "summary"), ("instruction", "output")])
def test_alpaca_joins_instruction_and_input_behind_system_and_history(tmp_path, columns):
    record = {"instruction": "Count.", "input": "1, 2", "output": "3"}
    found = source(
        tmp_path, record, {**record, "input": ""}, {**record, "system": "s", "history": [["q", "a"]]}, columns=columns
    )
    assert found.files()[0][1:] == ("alpaca", 3)
    assert found[0] == Sample("Count.\n1, 2", "3", (0, 11)) and found[1].prompt == "Count."
    assert found[2].turns() == (
        Turn("system", "s"),
        Turn("user", "q"),
        Turn("assistant", "a", in_loss=True),
        Turn("user", "Count.\n1, 2", context=(0, 11)),
        Turn("assistant", "3", in_loss=True),
    )


@pytest.mark.parametrize(
    "fields", [("query", "response"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer")]
)
def test_question_and_answer_under_other_names(tmp_path, fields):
    found = source(tmp_path, {**dict(zip(fields, ("q2", "a2"))), "history": [["q1", "a1"]], "system": None})
    assert found.files()[0][1] == "query"
    assert [(turn.role, turn.content) for turn in found[0].turns()] == [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
    ]


def test_adgen_records_have_history_too(tmp_path):
    found = source(tmp_path, {"content": "q2", "summary": "a2", "history": '[["q1", "a1"]]', "system": "s"})
    assert [turn.content for turn in found[0].turns()] == ["s", "q1", "a1", "q2", "a2"] and not found.unused()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"history": "earlier"}, "'history' is 'earlier'"),
        ({"history": [["q"]]}, "entry 1 of 'history' is \\['q'\\]"),
        ({"history": [["q", " "]]}, "'history, answer 1' is empty"),
        ({"system": ["s"]}, "'system' is list"),
        ({"output": ""}, "'output' is empty"),
        ({"instruction": " "}, "'instruction' is empty"),
    ],
)
def test_wrong_fields_are_named(tmp_path, change, message):
    with pytest.raises(InputError, match=f"a.jsonl: line 1: .*{message}"):
        source(tmp_path, {"instruction": "i", "output": "o", **change})


def test_fields_that_are_not_used_are_named_with_a_count(tmp_path):
    record = {"content": "q", "summary": "a", "id": "7"}
    [line] = source(
        tmp_path, record, {**record, "hint": "h", "more": [{"x": "y"}]}, {**record, "hint": "h", "n": 3}
    ).unused()
    assert "'hint' of 2, 'more' of 1 of 3 records" in line
    [line] = source(
        tmp_path, {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user")], "note": "n"}
    ).unused()
    assert "'note' of 1" in line and "'messages behind the last answer' of 1" in line
    assert source(tmp_path, {**record, "context_span": [0, 1], "dataset": "d", "answers": ["a"]}).unused() == []

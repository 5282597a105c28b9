"""Records to samples."""

import json

import pytest

from mindformers_glm32k.data.chats import ChatLayout
from mindformers_glm32k.data.formats import (
    TOOLS_INTRODUCTION,
    AdGenLayout,
    LongBenchLayout,
    Sample,
    Text,
    TextLayout,
    Turn,
    layout_of,
)
from mindformers_glm32k.data.longbench import PromptTemplates
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.errors import InputError

ADGEN = AdGenLayout(("content", "summary"))
LONGBENCH = {
    "input": "why?",
    "context": "because",
    "answers": ["first", "second"],
    "dataset": "qa",
    "length": 1,
    "language": "en",
    "all_classes": None,
    "_id": "1",
}


@pytest.fixture
def longbench(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"qa": "{context}\n{input}"}), encoding="utf-8")
    return LongBenchLayout(PromptTemplates(path))


def test_adgen_takes_its_two_columns_under_any_names():
    assert ADGEN.sample({"content": "q", "summary": "a", "other": 3}) == Sample("q", "a", (0, 1))
    assert AdGenLayout(("frage", "antwort")).sample({"frage": "q", "antwort": "a"}) == Sample("q", "a", (0, 1))


def test_adgen_may_say_where_the_long_document_stands():
    record = {"content": "read this: long", "summary": "a", "context_span": [11, 15], "context": "somebody else's"}
    assert ADGEN.sample(record) == Sample("read this: long", "a", (11, 15))
    for wrong in ([11], [3, 2], [-1, 3], [0, 16], [0, True], "11", [1.0, 2]):
        with pytest.raises(InputError, match="'context_span' is .* within 0 and 15"):
            ADGEN.sample({**record, "context_span": wrong})


def test_plain_text():
    assert TextLayout().matches({"text": "", "id": 1}) and not TextLayout().matches({"content": ""})
    assert TextLayout().sample({"text": "long", "id": 1}) == Text("long")
    with pytest.raises(InputError, match="'text' is empty"):
        TextLayout().sample({"text": " "})


def test_longbench_renders_the_prompt_and_takes_the_first_answer(longbench):
    assert longbench.sample(LONGBENCH) == Sample("because\nwhy?", "first", (0, 7))
    assert longbench.sample({**LONGBENCH, "input": ""}).prompt == "because\n"


@pytest.mark.parametrize(
    "record, message",
    [
        ({"content": "q"}, "column 'summary' is missing, found are 'content'; set origin_columns"),
        ({"content": 3, "summary": "a"}, "column 'content' is int \\(3\\)"),
        ({"content": None, "summary": "a"}, "column 'content' is NoneType"),
        ({"content": "q", "summary": " "}, "column 'summary' is empty"),
        ({"content": "q\ud800", "summary": "a"}, "half a surrogate pair at character 1"),
    ],
)
def test_wrong_adgen_records(record, message):
    with pytest.raises(InputError, match=message):
        ADGEN.sample(record)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answers": []}, "'answers' is \\[\\]"),
        ({"answers": "text"}, "'answers' is 'text'"),
        ({"answers": [3]}, "answers\\[0\\]' is int"),
        ({"answers": [""]}, "answers\\[0\\]' is empty"),
        ({"context": ["a"]}, "'context' is list"),
        ({"dataset": "other"}, "no prompt for the data set 'other'"),
    ],
)
def test_wrong_longbench_records(longbench, change, message):
    with pytest.raises(InputError, match=message):
        longbench.sample({**LONGBENCH, **change})


def test_the_layout_is_found_by_the_fields(longbench):
    layouts = [ADGEN, longbench]
    assert layout_of({"content": "", "summary": ""}, layouts) is ADGEN
    assert layout_of(LONGBENCH, layouts) is longbench
    assert layout_of({**LONGBENCH, "content": "", "summary": ""}, layouts) is ADGEN
    with pytest.raises(InputError, match="'sumary' looks like 'summary'"):
        layout_of({"content": "", "sumary": ""}, layouts)


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def turns(record):
    return list(ChatLayout().sample(record).turns())


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_assistants_are_learnt_and_nobody_else(field):
    record = {field: [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER], "id": 3}
    assert ChatLayout().matches(record)
    assert turns(record) == [
        Turn("system", "s"),
        Turn("user", "q"),
        Turn("assistant", "a", in_loss=True),
        Turn("user", "q"),
        Turn("assistant", "a", in_loss=True),
    ]


def test_an_answer_may_be_kept_out_of_the_loss():
    assert [turn.in_loss for turn in turns({"messages": [USER, {**ANSWER, "loss": False}, USER, ANSWER]})] == [
        False,
        False,
        False,
        True,
    ]


def test_metadata_observations_and_tools_of_the_system_message():
    tools = [{"name": "weather", "parameters": {"city": "Köln"}}]
    record = {
        "messages": [
            {"role": "system", "content": "s", "tools": tools},
            USER,
            {"role": "assistant", "content": "call", "metadata": "weather"},
            {"role": "observation", "content": "{}"},
            ANSWER,
        ]
    }
    listed = json.dumps(tools, indent=4, ensure_ascii=False)
    assert turns(record)[0] == Turn("system", f"s\n{listed}")
    assert turns(record)[2:4] == [Turn("assistant", "call", "weather", True), Turn("observation", "{}")]
    given_beside = {"messages": [{"role": "system", "content": "s"}, *record["messages"][1:]], "tools": tools}
    assert turns(given_beside) == turns(record)


def test_the_published_format_of_tools():
    """As ChatGLM3's finetune_chatmodel_demo turns it into messages."""
    record = {
        "tools": ["weather: tells it"],
        "conversations": [
            {"role": "system", "content": "s"},
            USER,
            {"role": "assistant", "content": "thought"},
            {
                "role": "tool",
                "name": "weather",
                "parameters": {"city": "Köln", "days": 3, "fine": True},
                "observation": {"sky": "天"},
            },
            ANSWER,
        ],
    }
    assert turns(record) == [
        Turn("system", TOOLS_INTRODUCTION + '\n[\n    "weather: tells it"\n]'),
        Turn("system", "s"),
        Turn("user", "q"),
        Turn("assistant", "thought", in_loss=True),
        Turn("assistant", "```python\ntool_call(city='Köln', days=3, fine=True)\n```", "weather", True),
        Turn("observation", '{"sky": "天"}'),
        Turn("assistant", "a", in_loss=True),
    ]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "'messages' is \\[\\]"),
        ({"messages": "hello"}, "'messages' is 'hello'"),
        ({"messages": [USER]}, "'messages' has no assistant message to learn from"),
        ({"messages": [USER, {**ANSWER, "loss": False}]}, "no assistant message to learn from"),
        ({"messages": [USER, "a"]}, "message 2 of 'messages': is str, not an object"),
        ({"messages": [{"role": "narrator", "content": "q"}, ANSWER]}, "message 1 of 'messages': role is 'narrator'"),
        ({"messages": [{"content": "q"}, ANSWER]}, "role is None"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 1.*'content' is missing"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "'content' is int"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "half a surrogate pair"),
        ({"messages": [{**USER, "wait": 3}, ANSWER]}, "unknown key 'wait'"),
        ({"messages": [{**USER, "loss": "no"}, ANSWER]}, "'loss' is 'no'"),
        ({"messages": [{**USER, "tools": []}, ANSWER]}, "'tools' belong to a system message"),
        ({"conversations": [USER, {"role": "tool", "name": "n", "parameters": "x"}]}, "'parameters' of a tool message"),
        ({"messages": [{"role": "system", "content": "", "tools": [1]}, USER, ANSWER], "tools": [2]}, "given twice"),
        ({"text": "x"}, "has neither 'messages' nor 'conversations'"),
    ],
)
def test_wrong_records(record, message):
    with pytest.raises(InputError, match=message):
        turns(record)


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


def test_tools_beside_a_question_are_told_to_the_model(tmp_path):
    tools = [{"name": "tide", "description": "hours"}]
    record = {"instruction": "q", "output": "a", "tools": json.dumps(tools), "history": [["q0", "a0"]]}
    found = source(tmp_path, record, {**record, "tools": tools, "system": "s"}, {**record, "tools": "[]"})
    listed = "\n" + json.dumps(tools, indent=4)
    assert [turn.content for turn in found[0].turns()] == [TOOLS_INTRODUCTION + listed, "q0", "a0", "q", "a"]
    assert found[1].turns()[0] == Turn("system", "s" + listed) and found[2].turns()[0].role == "user"
    assert not found.unused()
    with pytest.raises(InputError, match="line 1: tools are the text 'tide', which is no JSON list"):
        source(tmp_path, {**record, "tools": "tide"})


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

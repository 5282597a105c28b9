"""Chat lines to turns."""

import json

import pytest

from mindformers_glm32k.data.chats import TOOLS_INTRODUCTION, ChatLayout
from mindformers_glm32k.data.formats import Turn
from mindformers_glm32k.errors import InputError

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
        Turn("assistant", "a", learnt=True),
        Turn("user", "q"),
        Turn("assistant", "a", learnt=True),
    ]


def test_an_answer_may_be_kept_out_of_the_loss():
    assert [turn.learnt for turn in turns({"messages": [USER, {**ANSWER, "loss": False}, USER, ANSWER]})] == [
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
        Turn("assistant", "thought", learnt=True),
        Turn("assistant", "```python\ntool_call(city='Köln', days=3, fine=True)\n```", "weather", True),
        Turn("observation", '{"sky": "天"}'),
        Turn("assistant", "a", learnt=True),
    ]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "'messages' is \\[\\]"),
        ({"messages": "hello"}, "'messages' is 'hello'"),
        ({"messages": [USER]}, "'messages' has no assistant message to learn from"),
        ({"messages": [USER, {**ANSWER, "loss": False}]}, "no assistant message to learn from"),
        ({"messages": [USER, "a"]}, "message 2 of 'messages': is str, not an object"),
        ({"messages": [{"role": "human", "content": "q"}, ANSWER]}, "message 1 of 'messages': role is 'human'"),
        ({"messages": [{"content": "q"}, ANSWER]}, "role is None"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 1.*'content' is missing"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "'content' is int"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "half a surrogate pair"),
        ({"messages": [{**USER, "weight": 3}, ANSWER]}, "unknown key 'weight'"),
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

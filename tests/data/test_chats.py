"""Conversations in OpenAI's and ShareGPT's forms, and what beside the messages is used."""

import json

import pytest

from mindformers_glm32k.data.chats import ChatLayout, OpenAILayout, ShareGPTLayout
from mindformers_glm32k.data.formats import TOOLS_INTRODUCTION, Turn
from mindformers_glm32k.errors import InputError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {"name": "tide", "description": "hours of the tide", "parameters": {"type": "object", "properties": {}}}
CALL = Turn("assistant", "```python\ntool_call(port='Brest', day=3)\n```", "tide", True)
ARGUMENTS = '{"port": "Brest", "day": 3}'


def turns(record):
    return list(ChatLayout().sample(record).turns())


def listed(tools):
    return json.dumps(tools, indent=4, ensure_ascii=False)


def test_a_system_prompt_beside_the_messages_is_the_first_message():
    assert turns({"system": "s", "messages": [USER, ANSWER]})[0] == Turn("system", "s")
    assert turns({"system": " ", "messages": [USER, ANSWER]})[0] == Turn("user", "q")
    same = [{"role": "system", "content": "s"}, USER, ANSWER]
    assert turns({"system": "s", "messages": same}) == turns({"messages": same})
    with pytest.raises(InputError, match="system prompt is given twice"):
        turns({"system": "t", "messages": same})
    with_tools = turns({"system": "s", "tools": [FUNCTION], "messages": [USER, ANSWER]})
    assert with_tools[0] == Turn("system", "s\n" + listed([FUNCTION]))


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [FUNCTION]},
        {"tools": json.dumps([FUNCTION])},
        {"tools": [json.dumps(FUNCTION)]},
        {"tools": [{"type": "function", "function": FUNCTION}]},
        {"functions": [FUNCTION]},
    ],
)
def test_tools_in_every_form_are_listed_alike(given):
    assert turns({"messages": [USER, ANSWER], **given})[0] == Turn(
        "system", TOOLS_INTRODUCTION + "\n" + listed([FUNCTION])
    )


def test_openai_tool_calls_are_calls_and_results_observations():
    call = {"id": "c", "type": "function", "function": {"name": "tide", "arguments": ARGUMENTS}}
    record = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "9"},
            {"role": "assistant", "content": "a", "weight": 1},
        ]
    }
    expected = [
        Turn("system", "s"),
        Turn("user", "q\nr"),
        CALL,
        Turn("observation", "9"),
        Turn("assistant", "a", "", True),
    ]
    assert OpenAILayout().matches(record) and turns(record) == expected
    old = [
        *record["messages"][:2],
        {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": ARGUMENTS}},
        {"role": "function", "name": "tide", "content": "9"},
        ANSWER,
    ]
    assert turns({"messages": old}) == expected
    thought = turns({"messages": [USER, {"role": "assistant", "content": "t", "tool_calls": [call]}]})
    assert thought[1:] == [Turn("assistant", "t", in_loss=True), CALL]


def test_weight_0_keeps_an_answer_out_of_the_loss():
    found = turns({"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]})
    assert [turn.in_loss for turn in found] == [False, False, False, True]


def test_sharegpt():
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "tide", "arguments": ' + ARGUMENTS + "}"},
            {"from": "observation", "value": "9"},
            {"from": "gpt", "value": "a"},
        ],
        "system": "s",
        "tools": json.dumps([FUNCTION]),
    }
    assert ShareGPTLayout().matches(record) and not ShareGPTLayout().matches({"conversations": [USER, ANSWER]})
    assert turns(record) == [
        Turn("system", TOOLS_INTRODUCTION + "\n" + listed([FUNCTION])),
        Turn("system", "s"),
        Turn("user", "q"),
        CALL,
        Turn("observation", "9"),
        Turn("assistant", "a", in_loss=True),
    ]
    assert turns({"conversations": json.dumps([USER, ANSWER])}) == turns({"messages": [USER, ANSWER]})
    assert turns({"conversation": [{"system": "s", "input": "q", "output": "a"}]}) == turns(
        {"system": "s", "messages": [USER, ANSWER]}
    )


def test_roles_in_capitals_are_roles():
    assert turns({"messages": [{**USER, "role": "User"}, {**ANSWER, "role": " ASSISTANT"}]}) == turns(
        {"messages": [USER, ANSWER]}
    )


@pytest.mark.parametrize(
    "messages, message",
    [
        ([USER, {**ANSWER, "content": " \n"}], "message 2 of 'messages': the answer is empty"),
        ([USER, {**ANSWER, "content": None, "metadata": "tide"}], "message 2.*'content' is NoneType"),
        ([{**USER, "name": "bob"}, ANSWER], "'name' is 'bob' in a message of the role user"),
        ([USER, {**ANSWER, "parameters": {"a": 1}}], "'parameters' belongs to a message of the role tool"),
        ([USER, {**ANSWER, "observation": "9"}], "'observation' belongs to a message of the role tool"),
        ([USER, {**ANSWER, "weight": 0.5}], "'weight' is 0.5, neither 0 nor 1"),
        ([{**USER, "loss": True}, ANSWER], "'loss' is True in a message of the role user; only answers are learnt"),
        ([{**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER], "the model reads text only"),
        ([USER, {**ANSWER, "tool_calls": [{"function": {"name": "n"}}] * 2}], "of 2 calls .* 'n', 'n' have no"),
        ([USER, {**ANSWER, "tool_calls": [{"function": {"name": "n", "arguments": "x"}}]}], "'arguments' of the call"),
        ([USER, {"from": "function_call", "value": "call it"}], "the call 'call it' is not understood"),
        ([{**USER, "tool_calls": [{"function": {"name": "n"}}]}, ANSWER], "a call belongs to an assistant message"),
    ],
)
def test_what_the_format_cannot_say_is_named(messages, message):
    with pytest.raises(InputError, match=message):
        turns({"messages": messages})


def called(*names, ids=True):
    """An assistant's message with several calls at once."""
    calls = [
        {"id": f"c{place}", "function": {"name": name, "arguments": ARGUMENTS}} for place, name in enumerate(names)
    ]
    return {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": calls if ids else [{**call, "id": None} for call in calls],
    }


def result(text, **keys):
    return {"role": "tool", "content": text, **keys}


@pytest.mark.parametrize(
    "messages",
    [
        [called("tide", "wind"), result("9", tool_call_id="c0"), result("7", tool_call_id="c1")],
        [called("tide", "wind"), result("7", tool_call_id="c1"), result("9", tool_call_id="c0")],
        [called("tide", "wind", ids=False), result("9"), result("7")],
        [called("tide", "wind"), result("7", name="wind"), result("9", name="tide")],
    ],
)
def test_several_calls_become_one_after_the_other(messages):
    wind = Turn("assistant", CALL.content, "wind", True)
    assert turns({"messages": [USER, *messages, ANSWER]}) == [
        Turn("user", "q"),
        Turn("assistant", "Let me see.", in_loss=True),
        CALL,
        Turn("observation", "9"),
        wind,
        Turn("observation", "7"),
        Turn("assistant", "a", in_loss=True),
    ]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([USER, called("tide", "wind"), result("9", tool_call_id="c0"), ANSWER], "message 4 .* 'wind' have no result"),
        ([USER, called("tide", "wind"), result("9", tool_call_id="c5")], "message 3 .*'tool_call_id' is 'c5'; no call"),
        ([USER, called("tide"), result("9", tool_call_id="c5"), ANSWER], "message 3 .*'tool_call_id' is 'c5'; no call"),
        ([USER, {"from": "function_call", "value": '[{"name": "f"}, {"name": "g"}]'}], "message 2 .*has 2 calls"),
        (
            [USER, {**called("f"), "function_call": {"name": "g", "arguments": '{"a": 1, "a": 2}'}}],
            "'a' is given twice",
        ),
    ],
)
def test_calls_and_results_that_do_not_fit(messages, message):
    with pytest.raises(InputError, match=message):
        turns({"messages": messages})


def test_tools_that_are_no_json_are_named():
    with pytest.raises(InputError, match="tools are the text 'weather', which is no JSON list"):
        turns({"messages": [USER, ANSWER], "tools": "weather"})
    with pytest.raises(InputError, match="tools hold NaN or Infinity"):
        turns({"messages": [USER, ANSWER], "tools": [{"name": "f", "x": float("nan")}]})
    with pytest.raises(InputError, match="key 'name' is given twice"):
        turns({"messages": [USER, ANSWER], "tools": '[{"name": "f", "name": "g"}]'})
    with pytest.raises(InputError, match="both 'tools' and 'functions'"):
        turns({"messages": [USER, ANSWER], "tools": [FUNCTION], "functions": [FUNCTION]})


def test_an_answer_that_is_not_learnt_may_be_empty():
    assert turns({"messages": [USER, {**ANSWER, "content": "", "loss": False}, USER, ANSWER]})[1].content == ""

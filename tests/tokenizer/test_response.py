"""What an answer says: messages, metadata, the tool that is called."""

import pytest

from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.response import call_arguments, read_message, read_response
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(small_vocab_file):
    return Vocabulary(small_vocab_file)


def published(output):
    """`process_response` of the published model, for one message: what it puts into the history."""
    if "\n" in output:
        metadata, content = output.split("\n", maxsplit=1)
    else:
        metadata, content = "", output
    return (metadata, content.strip()) if not metadata.strip() else (metadata.strip(), content)


@pytest.mark.parametrize("text", ["\n 你好", "你好", " \n two\nlines \n", "get_weather\n a\n", "", "\n", " x\ny"])
def test_messages_are_read_as_the_published_model_reads_them(text):
    message = read_message(text)
    metadata, content = published(text)
    if metadata:
        content = content.removeprefix(" ")  # the tokenizer's own
    assert (message["metadata"], message["content"]) == (metadata.strip(), content)
    assert message["role"] == "assistant"


@pytest.mark.parametrize("stop", ["</s>", "<|user|>", "<|observation|>"])
def test_nothing_behind_a_stop_token_is_read(vocabulary, stop):
    end = vocabulary.eos_id if stop == "</s>" else vocabulary.special[stop]
    ids = [*vocabulary.encode("\n ab"), end, *vocabulary.encode("cd"), vocabulary.special["<|assistant|>"]]
    response = read_response(vocabulary, ids)
    assert (response.content, response.metadata, response.ended, response.tool_call) == ("ab", "", True, None)
    assert not read_response(vocabulary, ids[:2]).ended


def test_role_names_in_an_answer_are_text(vocabulary):
    response = read_response(vocabulary, vocabulary.encode("\n say <|assistant|> and <|user|>"))
    assert response.content == "say <|assistant|> and <|user|>" and len(response.messages) == 1


@pytest.mark.parametrize("first", [None, "\n thinking"])
def test_messages_go_back_into_the_history_as_the_same_ids(vocabulary, first):
    """What was generated and what the next turn feeds are the same tokens."""
    history = [{"role": "assistant", "metadata": "", "content": "thinking"}] if first else []
    history.append({"role": "assistant", "metadata": "search", "content": "```python\ntool_call(q='a')\n```"})
    ids = chat.conversation_ids(vocabulary, history)[3:]  # without the prefix and <|assistant|>
    response = read_response(vocabulary, [*ids, vocabulary.special["<|observation|>"]])
    assert list(response.messages) == history
    assert response.tool_call.name == "search" and response.tool_call.arguments == {"q": "a"}


@pytest.mark.parametrize(
    "content, arguments",
    [
        ("```python\ntool_call(city='北京', days=3)\n```", {"city": "北京", "days": 3}),
        ("tool_call(x=[1, {'a': None}], y=-1.5, z=True)", {"x": [1, {"a": None}], "y": -1.5, "z": True}),
        ("```python\ntool_call()\n```", {}),
        ("```python\ntool_call(\n  text='a\\nb',\n)\n```", {"text": "a\nb"}),
        ("```python\ntool_call(q='not closed')", {"q": "not closed"}),
        ("tool_call(x=__import__('os').system('true'))", None),
        ("tool_call(**{'a': 1})", None),
        ("tool_call(1)", None),
        ("other(a=1)", None),
        ("print(1)\nprint(2)", None),
        ("", None),
        ("(" * 5000, None),
    ],
)
def test_calls_are_read_and_not_executed(content, arguments):
    assert call_arguments(content) == arguments


def test_what_chats_render_is_read_again(vocabulary):
    """A call that the data room writes for training has the arguments that it was given."""
    from mindformers_glm32k.data.chats import ChatLayout

    record = {
        "messages": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 'it\'s "q"', "b": [1.5, None, True]}}}],
            },
        ]
    }
    call = ChatLayout().sample(record).messages[-1]
    assert call.metadata == "f" and call_arguments(call.content) == {"a": 'it\'s "q"', "b": [1.5, None, True]}

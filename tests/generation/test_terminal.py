"""The chat's commands and answers, with a network that says what it is told to."""

import contextlib
import io
import os
import signal

import pytest

from mindformers_glm32k.generation.answers import Options
from mindformers_glm32k.generation.terminal import Chat
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(small_vocab_file):
    return Vocabulary(small_vocab_file)


class Told:
    """Answers with the next of its texts; `interrupt` is the token at which Ctrl-C comes."""

    room = 200

    def __init__(self, vocabulary, *answers, interrupt=None):
        self.vocabulary, self.answers, self.interrupt, self.prompts = vocabulary, list(answers), interrupt, []

    def generate(self, prompts, max_new_tokens, stop_ids, sampling=None, seeds=None, streamer=None):
        self.prompts.append(self.vocabulary.decode(prompts[0]))
        streamer.put(prompts)
        metadata, _, content = self.answers.pop(0).rpartition("\n")
        ids = [*self.vocabulary.encode(f"{metadata}\n"), *self.vocabulary.encode(content), stop_ids[1]]
        for count, index in enumerate(ids):
            if count == self.interrupt:
                os.kill(os.getpid(), signal.SIGINT)
            streamer.put(index)
        streamer.end()
        return [ids]


def talk(vocabulary, lines, *answers, room=200, **settings):
    """What is printed, and the chat, after the user has typed the lines."""
    out, lines = io.StringIO(), list(lines)
    network = Told(vocabulary, *answers, **settings)
    network.room = room

    def read(prompt):
        if not lines:
            raise EOFError
        line = lines.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        out.write(f"{prompt}{line}\n")
        return line

    chat = Chat(network, vocabulary, Options(20), read, out, lambda: contextlib.nullcontext(out))
    chat.run()
    return out.getvalue(), chat, network


def test_a_conversation(vocabulary):
    printed, chat, network = talk(vocabulary, ["你好", "and?", "/quit", "not read"], "\n你好，世界", "\nmore")
    assert "\n你好，世界\n[" in printed and "tokens/s" in printed and "of 200]" in printed
    assert "你好，世界" in network.prompts[1] and "not read" not in printed
    assert [len(exchange) for exchange in chat.conversation.exchanges] == [2, 2]


def test_commands(vocabulary, tmp_path):
    (tmp_path / "my notes.txt").write_text("the secret is 42")
    (tmp_path / "tools.json").write_text('[{"name": "search"}]')
    lines = [
        *(
            "/help",
            "/system be brief",
            "/tools tools.json",
            '/file "my notes.txt"',
            "/file none.txt",
            "/file .",
            "/nope",
        ),
        *("what is it?", "/context", "/save chat.jsonl", "/undo", "/undo", "/system off", "/tools off", "/context"),
        *("", KeyboardInterrupt, "/tmp/x is a path"),
    ]
    printed, chat, network = talk(vocabulary, lines, "\n42", "\nyes")
    assert "/undo          take the last question" in printed and "system prompt: be brief" in printed
    assert "tools: search" in printed and "my notes.txt: " in printed and "error: none.txt: cannot be read" in printed
    assert "error: .: is a folder" in printed and "no command /nope" in printed
    assert "the secret is 42\n\nwhat is it?" in network.prompts[0] and "be brief" in network.prompts[0]
    assert "taken back: the secret" in printed and "nothing to take back" in printed
    assert "system prompt: none" in printed and "tools: none" in printed and "(/quit or Ctrl-D leaves)" in printed
    assert (tmp_path / "chat.jsonl").read_text().startswith('{"messages": [{"role": "system"')
    assert "/tmp/x is a path" in network.prompts[1]


def test_a_tool_is_called_and_its_result_typed_in(vocabulary):
    call = "weather\ntool_call(city='北京')"
    printed, chat, network = talk(vocabulary, ["rain?", "sunny", "bye", ""], call, "\nno rain", call)
    assert "tool call: weather(city='北京')\nobservation (empty: none)> sunny\nno rain\n" in printed
    assert "sunny" in network.prompts[1]
    roles = [message["role"] for message in chat.conversation.exchanges[0]]
    assert roles == ["user", "assistant", "observation", "assistant"]
    assert len(chat.conversation.exchanges[1]) == 2, "no observation was given"


@pytest.fixture
def pythons_handler():
    """SIGINT as at a terminal: it is ignored where the tests are a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_handler")
def test_ctrl_c_stops_the_answer_and_not_the_program(vocabulary):
    printed, chat, _ = talk(vocabulary, ["a", "b"], "\none two three four", "\nwhole", interrupt=5)
    assert "(stopping)" in printed and "[stopped, " in printed
    assert len(chat.conversation.exchanges) == 2
    first, second = chat.conversation.exchanges
    assert "one two three four".startswith(first[1]["content"]) and len(first[1]["content"]) < 18
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)  # the handler of before is back
        signal.sigtimedwait([], 1)


def test_ctrl_c_before_the_answer_begins_takes_the_question_back(vocabulary):
    out, lines = io.StringIO(), ["first", "second"]

    def read(prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    def quiet():
        if lines:  # between the first question and its answer
            raise KeyboardInterrupt
        return contextlib.nullcontext(out)

    chat = Chat(Told(vocabulary, "\nfine"), vocabulary, Options(20), read, out, quiet)
    chat.run()
    assert "(stopped; the question is taken back)" in out.getvalue()
    assert [exchange[0]["content"] for exchange in chat.conversation.exchanges] == ["second"]
    assert not chat.conversation.waits()


def test_the_context_is_warned_of_and_what_is_dropped_named(vocabulary):
    lines = [f"{number} " + "word " * 8 for number in range(6)]
    printed, chat, network = talk(vocabulary, lines, *["\nfine"] * 6, room=150)
    assert "warning: " in printed and "the next to be dropped is: " in printed
    assert "the context is full, dropped: 0 word" in printed
    assert printed.index("the next to be dropped is: 0 word") < printed.index("the context is full, dropped: 0 word")
    assert printed.count("full, dropped: 0 word") == 1 and "full, dropped: 1 word" in printed
    printed, chat, network = talk(vocabulary, ["word " * 300, "short"], "\nfine", room=150)
    assert "error: the message makes a prompt of" in printed and len(chat.conversation.exchanges) == 1

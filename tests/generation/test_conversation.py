"""The conversation of a chat: the exchanges in the prompt, those dropped, documents, tools."""

import json

import pytest

from mindformers_glm32k.data.chats import ChatLayout
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.conversation import Conversation, read_document
from mindformers_glm32k.generation.questions import prompt_ids
from mindformers_glm32k.tokenizer.response import read_response
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(small_vocab_file):
    return Vocabulary(small_vocab_file)


@pytest.fixture
def conversation(vocabulary):
    return Conversation(vocabulary, room=150, max_new_tokens=30)


def exchange(conversation, vocabulary, question, answer="fine"):
    conversation.ask(question)
    prompt = conversation.prompt()
    conversation.answered(read_response(vocabulary, [*vocabulary.encode(f"\n {answer}"), vocabulary.eos_id]))
    return prompt


def test_prompts_are_the_whole_history(conversation, vocabulary):
    conversation.system = "be kind"
    exchange(conversation, vocabulary, "one")
    prompt = exchange(conversation, vocabulary, "two")
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "two"},
    ]
    assert prompt == prompt_ids(vocabulary, messages)
    assert (
        conversation.used()
        == len(prompt_ids(vocabulary, messages)) + conversation.tokens([{"role": "assistant", "content": "fine"}]) - 1
    )


def test_the_oldest_exchanges_are_dropped_and_come_back(conversation, vocabulary):
    conversation.system = "system prompt"
    for number in range(6):
        prompt = exchange(conversation, vocabulary, f"{number} " + "word " * 8)
        assert len(prompt) <= conversation.most
    assert 0 < len(conversation.fed()) < 6 and conversation.fed()[-1] is conversation.exchanges[-1]
    assert "system prompt" in vocabulary.decode(prompt)
    before = len(conversation.fed())
    first = conversation.fed()[0]
    conversation.undo()
    assert conversation.fed()[0] is not first or len(conversation.fed()) == before - 1
    while conversation.exchanges:
        conversation.undo()
    assert conversation.undo() is None


def test_a_message_that_is_too_long_alone(conversation, vocabulary):
    conversation.ask("word " * 300)
    with pytest.raises(InputError, match=r"prompt of [\d,]+ tokens, 120 fit beside an answer"):
        conversation.prompt()
    truncating = Conversation(vocabulary, 150, 30, "truncate")
    truncating.ask("word " * 300)
    assert len(truncating.prompt()) <= 120


def test_documents_tools_and_what_is_saved(conversation, vocabulary, tmp_path):
    conversation.documents = [("a.txt", "the document")]
    assert conversation.used() > 2
    assert conversation.set_tools('[{"name": "search", "parameters": {}}]') == 1
    conversation.ask("what?")
    assert conversation.exchanges[0][0]["content"] == "the document\n\nwhat?" and conversation.documents == []
    call = [*vocabulary.encode("search\n"), *vocabulary.encode("tool_call(q='x')")]
    conversation.answered(read_response(vocabulary, [*call, vocabulary.special["<|observation|>"]]))
    conversation.observe("found")
    text = vocabulary.decode(Conversation.prompt(conversation)) if conversation.room > 400 else ""
    assert "role" not in text
    conversation.answered(read_response(vocabulary, [*vocabulary.encode("\n done"), vocabulary.eos_id]))
    conversation.save(tmp_path / "chat.jsonl")
    record = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))
    roles = [turn.role for turn in ChatLayout().sample(record).messages]
    assert roles == ["system", "user", "assistant", "observation", "assistant"]
    assert record["messages"][2]["metadata"] == "search"


@pytest.mark.parametrize("text", ["no", "[]", "[1]", '[{"description": "nameless"}]'])
def test_wrong_tools_are_named(conversation, text):
    with pytest.raises(InputError):
        conversation.set_tools(text)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pdf", b"%PDF-1.7 \x00", "is a PDF; make text of it: pdftotext a.pdf a.pdf.txt"),
        ("a.docx", b"PK\x03\x04rest", "an archive"),
        ("a.bin", b"a\x00b", "zero bytes"),
        ("a.txt", "你好".encode("gb18030"), "not UTF-8 at byte 0; convert it"),
        ("a.txt", b" \n", "no text in it"),
    ],
)
def test_what_is_no_document_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_document(tmp_path / name)


def test_documents_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff第一行\r\n二".encode())
    assert read_document(tmp_path / "a.txt") == "第一行\n二"
    (tmp_path / "b.txt").write_bytes("第一行".encode("utf-16"))
    assert read_document(tmp_path / "b.txt") == "第一行"
    with pytest.raises(InputError, match="is a folder; /file takes one text file"):
        read_document(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_document(tmp_path / "none.txt")

"""A growing conversation: the exchanges that fit into the prompt, and documents for its context."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mindformers_glm32k.data.formats import TOOLS_INTRODUCTION
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.generation.questions import TRUNCATE, fitted_ids, prompt_ids
from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.response import Response
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

_TAKES = "/file takes one text file, such as .txt, .md, .py or .json"
# first bytes -> what the file is, and how to convert it to text; {0} is its name
_KNOWN = (
    (b"%PDF", "a PDF; make text of it: pdftotext {0} {0}.txt"),
    (b"PK\x03\x04", "an archive (.docx, .xlsx, .epub and .zip are); save it as text: pandoc -t plain {0} -o {0}.txt"),
    (b"\xd0\xcf\x11\xe0", "an old Office file; save it as text"),
    (b"\x1f\x8b", "compressed; unpack it: gunzip {0}"),
    (b"\x89PNG", "a picture, and the model reads text only"),
    (b"\xff\xd8\xff", "a picture, and the model reads text only"),
)
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_MOST_BYTES = 16 << 20  # the context holds some 200 KB


class Conversation:
    """System prompt, tools, documents and exchanges; an exchange is a question and all that follows up to the next.

    What does not fit into the context is not fed: the oldest exchanges go first, the system prompt stays. Nothing is
    forgotten: after `undo` an older exchange may fit again, and `save` writes all.

    Args:
        vocabulary: of the model.
        room: tokens of prompt and answer together.
        max_new_tokens: kept free for the answer.
        on_long_prompt: for a question that alone is too long: "error", or "truncate" to leave out its middle.
    """

    def __init__(self, vocabulary: Vocabulary, room: int, max_new_tokens: int, on_long_prompt: str = "error"):
        self._vocabulary = vocabulary
        self.room, self.most = room, room - max_new_tokens
        self._truncates = on_long_prompt == TRUNCATE
        self.system = ""
        self.tools: list | None = None
        self.documents: list[tuple[str, str]] = []  # name and text, for the next question
        self.exchanges: list[list[dict]] = []

    def set_tools(self, text: str) -> int:
        """Sets tools from a JSON list; a system prompt tells the model to use them. Returns their number.

        Raises:
            InputError: no JSON list of tools with names.
        """
        try:
            tools = json.loads(text)
        except ValueError as error:
            raise InputError(f"no JSON ({error})") from error
        tools = tools if isinstance(tools, list) else [tools]
        named = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in tools]
        if not tools or not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in named):
            raise InputError('a list of tools is needed, each {"name": …, "description": …, "parameters": …}')
        self.tools = tools
        return len(tools)

    def ask(self, text: str) -> None:
        """Adds a question, preceded by the waiting documents."""
        several = len(self.documents) > 1
        documents = [f"{name}:\n{content}" if several else content for name, content in self.documents]
        self.exchanges.append([{"role": "user", "content": "\n\n".join([*documents, text])}])
        self.documents = []

    def observe(self, text: str) -> None:
        """Adds what a tool returned."""
        self.exchanges[-1].append({"role": "observation", "content": text})

    def answered(self, response: Response) -> None:
        """Adds the answer."""
        self.exchanges[-1] += [dict(message) for message in response.messages]

    def waits(self) -> bool:
        """Whether the last question has no answer yet."""
        return bool(self.exchanges) and len(self.exchanges[-1]) == 1

    def undo(self) -> str | None:
        """Removes the last exchange and returns its question; None where there is none."""
        return self.exchanges.pop()[0]["content"] if self.exchanges else None

    def clear(self) -> None:
        """Starts a new conversation; system prompt and tools stay."""
        self.exchanges, self.documents = [], []

    def system_messages(self) -> list[dict]:
        """The message that every prompt begins with, or none."""
        if self.tools:
            return [{"role": "system", "content": self.system or TOOLS_INTRODUCTION, "tools": self.tools}]
        return [{"role": "system", "content": self.system}] if self.system else []

    def fed(self) -> list[list[dict]]:
        """The newest exchanges that fit, at least the last."""
        spare = self.most - len(prompt_ids(self._vocabulary, self.system_messages()))
        kept: list[list[dict]] = []
        for exchange in reversed(self.exchanges):
            spare -= self.tokens(exchange)
            if spare < 0 and kept:
                break
            kept.insert(0, exchange)
        return kept

    def prompt(self) -> list[int]:
        """The ids that ask for the next answer.

        Raises:
            InputError: the last exchange alone is too long.
        """
        messages = [*self.system_messages(), *(message for exchange in self.fed() for message in exchange)]
        ids = prompt_ids(self._vocabulary, messages)
        if len(ids) <= self.most:
            return ids
        if self._truncates:
            # `tools` is written into the content by the format
            return fitted_ids(self._vocabulary, messages, self.most)
        raise InputError(
            f"the message makes a prompt of {len(ids):,} tokens, {self.most:,} fit beside an answer; take a part of "
            "it, or start with --on_long_prompt truncate"
        )

    def tokens(self, messages: Sequence[dict]) -> int:
        """How many tokens messages have."""
        return len(chat.conversation_ids(self._vocabulary, messages)) - len(chat.prefix_ids(self._vocabulary))

    def used(self) -> int:
        """Tokens of what is fed so far, with the documents that wait."""
        waiting = [{"role": "user", "content": text} for _, text in self.documents]
        messages = [message for exchange in self.fed() for message in exchange]
        return len(chat.conversation_ids(self._vocabulary, [*self.system_messages(), *messages, *waiting]))

    def save(self, path: str | Path) -> None:
        """Writes the conversation as one JSON line, as training data and `glm32k generate` read it."""
        messages = [message for exchange in self.exchanges for message in exchange]
        record = {"messages": [*self.system_messages(), *messages]}
        with atomic_path(Path(path).expanduser()) as temporary:
            temporary.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


def title(exchange: Sequence[dict], length: int = 30) -> str:
    """An exchange's first words, for messages."""
    words = " ".join(exchange[0]["content"][: 4 * length].split())
    return words if len(words) <= length else words[:length] + "…"


def read_document(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; line ends become line feeds.

    Raises:
        InputError: a folder, a PDF or the like, a binary, empty, too large or missing file, or another encoding.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"{path}: is a folder; {_TAKES}, one at a time")
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise InputError(f"{path}: has {size >> 20} MB, far more than the context holds; take a part of it")
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_TAKES}") from error
    for magic, what in _KNOWN:
        if raw.startswith(magic):
            raise InputError(f"{path}: is {what.format(path.name)} ({_TAKES})")
    encoding = next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in raw:
        raise InputError(f"{path}: has zero bytes, so it is no text; {_TAKES}")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start}; convert it (from GBK: iconv -f GB18030 -t UTF-8)"
        ) from error
    if not text.strip():
        raise InputError(f"{path}: there is no text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")

"""Parses the model's answer: generated ids into messages, and a message into a tool call.

Source: `process_response` and `chat` of the model published with THUDM/chatglm3-6b-32k. There the answer is parsed as
text, in which `<|assistant|>` may be plain characters, and the call is run by `eval`; here ids are split, and nothing
is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindformers_glm32k.tokenizer.chat_format import answer_ids, stop_ids
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model calls.

    Attributes:
        name: the message's metadata.
        arguments: by name; None where the content is no call with constants as arguments.
        content: the message's text, as it came.
    """

    name: str
    arguments: dict[str, Any] | None
    content: str


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        messages: for the history, each with role, metadata and content; one, or several where the model spoke before
            it called a tool.
        ended: whether a stop token ended it, and not the limit of tokens.
    """

    messages: tuple[dict[str, str], ...]
    ended: bool

    @property
    def content(self) -> str:
        """The last message's text."""
        return self.messages[-1]["content"]

    @property
    def metadata(self) -> str:
        """The last message's metadata: the name of a tool, or nothing."""
        return self.messages[-1]["metadata"]

    @property
    def tool_call(self) -> ToolCall | None:
        """The call that the answer ends with; None where it is a text."""
        if not self.metadata:
            return None
        return ToolCall(self.metadata, call_arguments(self.content), self.content)


def read_response(vocabulary: Vocabulary, ids: Sequence[int]) -> Response:
    """Reads generated ids, without the prompt, up to the first stop token; `<|assistant|>` separates messages."""
    kept = answer_ids(vocabulary, ids)
    again = vocabulary.special["<|assistant|>"]
    parts: list[list[int]] = [[]]
    for index in kept:
        if index == again:
            parts.append([])
        else:
            parts[-1].append(index)
    texts = [vocabulary.decode(part, skip_special_tokens=True) for part in parts]
    # an answer that begins with <|assistant|> has nothing before it
    messages = [read_message(text) for text in texts if text.strip()] or [read_message("")]
    ended = len(ids) > len(kept) and int(ids[len(kept)]) in stop_ids(vocabulary)
    return Response(tuple(messages), ended)


def read_message(text: str) -> dict[str, str]:
    """One assistant message for the history; text without a line break has no metadata.

    A call loses its leading space, which the tokenizer adds again when it encodes the history. The published model
    keeps the space, and so feeds two.
    """
    metadata, newline, content = text.partition("\n")
    if not newline:
        metadata, content = "", text
    metadata = metadata.strip()
    return {
        "role": "assistant",
        "metadata": metadata,
        "content": content.removeprefix(" ") if metadata else content.strip(),
    }


def call_arguments(content: str) -> dict[str, Any] | None:
    """The arguments of `tool_call(name=value, …)`, with or without the fence of a code block around it.

    Values are Python constants, lists and dictionaries of them; None for anything else. Nothing is executed.
    """
    lines = content.strip().split("\n")
    if lines[0].startswith("```"):
        lines = lines[1:-1] if lines[-1].startswith("```") else lines[1:]
    try:
        call = ast.parse("\n".join(lines).strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or getattr(call.func, "id", None) != "tool_call":
            return None
        if any(keyword.arg is None for keyword in call.keywords):
            return None
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None

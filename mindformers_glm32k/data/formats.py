"""What a record may look like: each layout turns a record into a sample, or says what is wrong with it.

A sample is one of three: a `Sample` (one question with its answer), a `Chat` (any number of turns) or a `Text`
(no roles at all, for continued training).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindformers_glm32k.checks import nearest
from mindformers_glm32k.data.prompts import PromptTemplates
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.vocabulary import ROLES

RENAME = "set origin_columns if the columns have other names"
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"
_KEYS = ("role", "content", "metadata", "tools", "loss", "name", "parameters", "observation")
_HINT = 'a message looks like {"role": "user", "content": "…"}'


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system", "user", "assistant" or "observation".
        content: the text.
        metadata: the rest of the role's line; the tool's name where an assistant calls one.
        in_loss: whether the content and the token that ends it are in the loss.
        context: where in `content`, in characters, the long document stands.
    """

    role: str
    content: str
    metadata: str = ""
    in_loss: bool = False
    context: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        prompt: what the user says, question included.
        answer: what the model is to answer.
        context: where in `prompt`, in characters, the long document stands. Truncation falls inside it.
    """

    prompt: str
    answer: str
    context: tuple[int, int]

    def turns(self) -> tuple[Turn, Turn]:
        """The same as a conversation."""
        return Turn("user", self.prompt, context=self.context), Turn("assistant", self.answer, in_loss=True)


@dataclass(frozen=True)
class Chat:
    """A conversation; at least one of its turns is in the loss."""

    messages: tuple[Turn, ...]

    def turns(self) -> tuple[Turn, ...]:
        return self.messages


@dataclass(frozen=True)
class Text:
    """Plain text, not empty, all of it in the loss."""

    text: str


class AdGenLayout:
    """{"content": "…", "summary": "…"}; other fields are ignored, but for `context_span`.

    `context_span`, where it is there, is [start, stop]: where in the first field, in characters, the long document
    stands. `glm32k preprocess` writes it. `columns` are the names of the two fields.
    """

    name = "adgen"

    def __init__(self, columns: Sequence[str]):
        self.fields = tuple(columns)

    def matches(self, record: dict) -> bool:
        """Whether a record has this layout's fields."""
        return all(field in record for field in self.fields)

    def sample(self, record: dict) -> Sample:
        """InputError (without the location) when a field is missing or no text."""
        prompt, answer = (text_field(record, field, RENAME) for field in self.fields)
        return Sample(prompt, answer, _span(record.get("context_span"), len(prompt)))


def _span(context, length):
    if context is None:
        return 0, length
    places = isinstance(context, list) and len(context) == 2 and all(type(place) is int for place in context)
    if not places or not 0 <= context[0] <= context[1] <= length:
        raise InputError(
            f"column 'context_span' is {context!r:.60}; it says where in the text, in characters, the "
            f"long document stands: [start, stop] within 0 and {length}. Mend or remove it"
        )
    return context[0], context[1]


class LongBenchLayout:
    """{"input": "…", "context": "…", "answers": ["…"], "dataset": "…", …}: prompt by template, first answer.

    `prompts` are None only where the layout is asked what it matches.
    """

    name = "longbench"
    fields = ("input", "context", "answers", "dataset")

    def __init__(self, prompts: PromptTemplates | None):
        self.prompts = prompts

    def matches(self, record: dict) -> bool:
        return all(field in record for field in self.fields)

    def sample(self, record: dict) -> Sample:
        """InputError (without the location) when a field is missing or wrong."""
        hint = "LongBench's fields are " + ", ".join(self.fields)
        text_field(record, "context", hint, may_be_empty=True)
        text_field(record, "dataset", hint)
        text_field(record, "input", hint, may_be_empty=True)
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers:
            found = "missing" if "answers" not in record else f"{answers!r:.60}"
            raise InputError(f"field 'answers' is {found}; a list with at least one text is needed")
        answer = text_field({"answers[0]": answers[0]}, "answers[0]", "a row needs an answer to learn")
        prompt, context = self.prompts.render(record)
        return Sample(prompt, answer, context)


class TextLayout:
    """{"text": "…"}; other fields are ignored."""

    name = "text"
    fields = ("text",)

    def matches(self, record: dict) -> bool:
        return "text" in record

    def sample(self, record: dict) -> Text:
        """InputError (without the location) when the field is missing, empty or no text."""
        return Text(text_field(record, "text", "plain text stands in the field 'text'"))


def layout_of(record: dict, layouts: list[Any]) -> Any:
    """The first layout that a record matches; InputError, with the fields found and those known, where none does."""
    for layout in layouts:
        if layout.matches(record):
            return layout
    known = " or ".join(", ".join(layout.fields) for layout in layouts)
    missing = [field for layout in layouts for field in layout.fields if field not in record]
    near = [f"{field!r} looks like {match!r}" for field in record for match in [nearest(field, missing)] if match]
    raise InputError(
        f"has the fields {_names(record)}; needed are {known}"
        + (f" ({'; '.join(near)})" if near else "")
        + f"; {RENAME}"
    )


def _names(record):
    return ", ".join(map(repr, record)) or "(none)"


def text_field(record: dict, field: str, hint: str, may_be_empty: bool = False) -> str:
    """The text in a record's field.

    Args:
        record: of a file.
        field: its name.
        hint: what to do when it is missing or no text.
        may_be_empty: whether blank text is fine.

    Raises:
        InputError: missing, no text, blank, or with half a surrogate pair, which no tokenizer can read.
    """
    value = record.get(field)
    if field not in record:
        raise InputError(f"column {field!r} is missing, found are {_names(record)}; {hint}")
    if not isinstance(value, str):
        raise InputError(f"column {field!r} is {type(value).__name__} ({value!r:.40}), a text is needed; {hint}")
    if not may_be_empty and not value.strip():
        raise InputError(f"column {field!r} is empty; fill it or remove the line")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"column {field!r} has half a surrogate pair at character {error.start}, "
                "which no tokenizer can read; mend the text"
            ) from error
    return value


class ChatLayout:
    """Chats, as ChatGLM3's published fine-tuning data has them.

        {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
        {"conversations": […], "tools": […]}

    A message has `role` (system, user, assistant, observation, or tool) and `content`; an assistant's may have
    `metadata` (the name of the tool it calls), a system message `tools`, any message `loss: false`, which keeps an
    answer out of the loss. Other fields of the record are ignored. Sources: README and preprocess_utils.py of
    ChatGLM3's finetune_chatmodel_demo for `conversations`, `tools` and the role `tool`; its PROMPT.md for metadata and
    observations.
    """

    name = "chat"
    fields = ("messages (or conversations)",)
    _LISTS = ("messages", "conversations")

    def matches(self, record: dict) -> bool:
        """Whether a record has one of the two lists."""
        return any(field in record for field in self._LISTS)

    def sample(self, record: dict) -> Chat:
        """InputError (without the location) when something is missing or wrong."""
        field = next((name for name in self._LISTS if name in record), None)
        if field is None:
            raise InputError(f"has neither 'messages' nor 'conversations'; {_HINT}")
        messages = record[field]
        if not isinstance(messages, list) or not messages:
            raise InputError(f"field {field!r} is {messages!r:.60}; a list with at least one message is needed")
        turns = []
        for number, message in enumerate(messages, 1):
            try:
                turns += _turns(message)
            except InputError as error:
                raise InputError(f"message {number} of {field!r}: {error}") from error
        if record.get("tools"):
            turns = _with_tools(turns, messages[0], record["tools"], is_own_message=field == "conversations")
        if not any(turn.in_loss for turn in turns):
            raise InputError(f"field {field!r} has no assistant message to learn from; add one or remove the line")
        return Chat(tuple(turns))


def _turns(message):
    """[Turn] of one message; two of a `tool` message, which holds the call and what the tool returned."""
    if not isinstance(message, dict):
        raise InputError(f"is {type(message).__name__}, not an object; {_HINT}")
    unknown = [key for key in message if key not in _KEYS]
    if unknown:
        raise InputError(f"has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    role, loss = message.get("role"), message.get("loss")
    if not (loss is None or isinstance(loss, bool)):
        raise InputError(f"'loss' is {loss!r:.40}, neither true nor false")
    if role == "tool":
        return _tool_turns(message, loss is not False)
    if role not in ROLES:
        raise InputError(f"role is {role!r:.40}, not one of {', '.join(ROLES)}, tool")
    content = text_field(message, "content", _HINT, may_be_empty=True)
    metadata = message.get("metadata")
    metadata = "" if metadata is None else text_field(message, "metadata", _HINT, may_be_empty=True)
    if message.get("tools") is not None:
        if role != "system":
            raise InputError(f"'tools' belong to a system message; found in one of the role {role}")
        content += "\n" + _listed(message["tools"])
    return [Turn(role, content, metadata, in_loss=role == "assistant" and loss is not False)]


def _tool_turns(message, in_loss):
    name = text_field(message, "name", "a tool message has name, parameters and observation")
    parameters, observation = message.get("parameters"), message.get("observation")
    if not isinstance(parameters, dict):
        raise InputError(f"'parameters' of a tool message is {parameters!r:.40}; an object is needed")
    if not isinstance(observation, str):
        observation = json.dumps(observation, ensure_ascii=False)
    arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    return [
        Turn("assistant", f"```python\ntool_call({arguments})\n```", name, in_loss),
        Turn("observation", observation),
    ]


def _with_tools(turns, first, tools, is_own_message):
    """Puts a record's tools in front: in a system message of their own, as ChatGLM3's own preprocessing does for
    `conversations`; for `messages` in the system message that is there, as its prompt format does."""
    if not is_own_message and turns[0].role == "system":
        if first.get("tools") is not None:
            raise InputError("tools are given twice, in the record and in its system message; remove one of them")
        system = turns[0]
        return [Turn("system", system.content + "\n" + _listed(tools), system.metadata)] + turns[1:]
    return [Turn("system", TOOLS_INTRODUCTION + "\n" + _listed(tools))] + turns


def _listed(tools):
    return json.dumps(tools, indent=4, ensure_ascii=False)

"""What a record may look like: each layout turns a record into a sample, or says what is wrong with it.

A sample is one of three: a `Sample` (one question with its answer), a `Chat` (any number of turns) or a `Text`
(no roles at all, for continued training).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindformers_glm32k.checks import UnusableJSON, nearest, parse_json
from mindformers_glm32k.data.longbench import PromptTemplates
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.chat_format import listed_tools

RENAME = "set origin_columns if the columns have other names"
_NAMES_OF_RECORDS = frozenset(("id", "_id"))  # identifiers, nothing to train on
_PREPROCESSED = frozenset(("dataset", "length", "answers", "language", "all_classes"))  # kept by `glm32k preprocess`


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system", "user", "assistant" or "observation".
        content: the text.
        metadata: the rest of the role's line; the tool's name where an assistant calls one.
        in_loss: whether the content and the token that ends it are in the loss.
        context: span [start, stop) of the long document in `content`, in characters; None: unknown.
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
        answer: the text in the loss.
        context: span [start, stop) of the long document in `prompt`, in characters. Truncation falls inside it.
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
    """{"content": "…", "summary": "…"}, optionally with `system`, `history` and `context_span`.

    `context_span` is [start, stop), the span of the long document in the first field, in characters; `glm32k
    preprocess` writes it. `columns`: names of the two fields.
    """

    name = "adgen"

    def __init__(self, columns: Sequence[str]):
        self.fields = tuple(columns)

    def matches(self, record: dict) -> bool:
        """Whether a record has this layout's fields."""
        return all(field in record for field in self.fields)

    def sample(self, record: dict) -> Sample | Chat:
        """The record as a sample; InputError, without file and line, where a field is missing or no text."""
        prompt, answer = (text_field(record, field, RENAME) for field in self.fields)
        return after_history(record, Sample(prompt, answer, _span(record.get("context_span"), len(prompt))))

    def unused(self, record: dict) -> list[str]:
        """Names of the fields with text that the sample leaves out."""
        used = (*self.fields, *BESIDE, "context_span")
        return unread(record, {*used, *_PREPROCESSED} if "context_span" in record else used)


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
    """{"input": "…", "context": "…", "answers": ["…"], "dataset": "…", …}: prompt from the template, first answer.

    `prompts` may be None where only `matches` is called.
    """

    name = "longbench"
    fields = ("input", "context", "answers", "dataset")

    def __init__(self, prompts: PromptTemplates | None):
        self.prompts = prompts

    def matches(self, record: dict) -> bool:
        return all(field in record for field in self.fields)

    def sample(self, record: dict) -> Sample:
        """The record as a sample; InputError, without file and line, where a field is missing or wrong."""
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

    def unused(self, record: dict) -> list[str]:
        """Always empty: fields that LongBench's template does not use are left out on purpose."""
        return []


class TextLayout:
    """{"text": "…"}."""

    name = "text"
    fields = ("text",)

    def matches(self, record: dict) -> bool:
        return "text" in record

    def sample(self, record: dict) -> Text:
        """The record as a sample; InputError, without file and line, where the field is missing, blank or no text."""
        return Text(text_field(record, "text", "plain text stands in the field 'text'"))

    def unused(self, record: dict) -> list[str]:
        return unread(record, self.fields)


BESIDE = ("system", "history", "tools")  # optional fields beside a question and its answer
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"


class QuestionLayout:
    """{"query": "…", "response": "…", "system": "…", "history": [["…", "…"], …]}, the last two optional.

    Sources: the custom-dataset pages of LLaMA-Factory, ms-swift and ChatGLM2; every answer of `history` is in the loss,
    as in all three.

    Args:
        name: of the layout.
        question, answer: names of the two fields.
        details: names of fields whose text follows the question, on a line of its own (Alpaca's `input`).
    """

    def __init__(self, name: str, question: str, answer: str, details: tuple[str, ...] = ()):
        self.name, self.question, self.answer, self.details = name, question, answer, details
        self.fields = (question, answer)

    def matches(self, record: dict) -> bool:
        """Whether a record has this layout's fields."""
        return all(field in record for field in self.fields)

    def sample(self, record: dict) -> Sample | Chat:
        """The record as a sample; InputError, without file and line, where a field is missing or no text."""
        asked = (self.question, *(field for field in self.details if record.get(field) is not None))
        texts = [text_field(record, field, RENAME, may_be_empty=True) for field in asked]
        prompt = "\n".join(text for text in texts if carries_text(text))
        if not prompt:
            raise InputError(f"column {self.question!r} is empty; fill it or remove the line")
        answer = text_field(record, self.answer, RENAME)
        return after_history(record, Sample(prompt, answer, (0, len(prompt))))

    def unused(self, record: dict) -> list[str]:
        """Names of the fields with text that the sample leaves out."""
        return unread(record, (*self.fields, *self.details, *BESIDE))


ALPACA, QUERY = "alpaca", "query"
QUESTION_LAYOUTS = (
    QuestionLayout(ALPACA, "instruction", "output", ("input",)),
    QuestionLayout(ALPACA, "instruction", "response", ("input", "context")),  # Dolly
    QuestionLayout(QUERY, "query", "response"),
    QuestionLayout(QUERY, "prompt", "response"),  # ChatGLM2
    QuestionLayout(QUERY, "prompt", "completion"),
    QuestionLayout(QUERY, "question", "answer"),
)


def after_history(record: dict, sample: Sample) -> Sample | Chat:
    """The sample, after its record's `system` prompt, `tools` and turns of `history` ([question, answer] pairs or
    messages); InputError where one of these has another form.
    """
    if record.keys().isdisjoint(BESIDE):
        return sample
    system, history = record.get("system"), json_value(record.get("history"))
    turns = []
    if carries_text(system):
        turns.append(Turn("system", text_field(record, "system", "a system prompt is a text")))
    if has_tools(record.get("tools")):
        turns = with_tools(turns, record["tools"], is_own_message=False)
    if not isinstance(history, (list, type(None))):
        raise InputError(f"field 'history' is {history!r:.60}; a list of [question, answer] is needed")
    for number, entry in enumerate(history or (), 1):
        values = list(entry.values()) if isinstance(entry, dict) else entry
        if isinstance(entry, dict) and set(entry) == {"role", "content"} and entry["role"] in ("user", "assistant"):
            text = text_field(entry, "content", f"entry {number} of 'history' has no text")
            turns.append(Turn(entry["role"], text, in_loss=entry["role"] == "assistant"))
        elif isinstance(values, list) and len(values) == 2:
            names = [f"history, question {number}", f"history, answer {number}"]
            question, answer = (
                text_field(dict(zip(names, values)), name, "history is a list of [question, answer]") for name in names
            )
            turns += [Turn("user", question), Turn("assistant", answer, in_loss=True)]
        else:
            raise InputError(f"entry {number} of 'history' is {entry!r:.60}; [question, answer] is needed")
    return Chat((*turns, *sample.turns())) if turns else sample


def has_tools(tools: Any) -> bool:
    """Whether a field holds tools; the JSON text of an empty list does not."""
    return bool(tools) and json_value(tools) not in ([], {}) and (not isinstance(tools, str) or carries_text(tools))


def with_tools(turns: list[Turn], tools: Any, is_own_message: bool) -> list[Turn]:
    """The turns with tools in front: in a system message of their own, as in ChatGLM3's preprocessing of
    `conversations`, or in the existing system message, as in its prompt format.

    Raises:
        InputError: no JSON list of tools.
    """
    if not is_own_message and turns and turns[0].role == "system":
        system = turns[0]
        return [Turn("system", system.content + "\n" + listed_tools(tools), system.metadata), *turns[1:]]
    return [Turn("system", TOOLS_INTRODUCTION + "\n" + listed_tools(tools)), *turns]


def json_value(value: Any) -> Any:
    """The list or object that a JSON text holds; any other value unchanged.

    Raises:
        InputError: an object in it has a key twice.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except UnusableJSON:
            raise
        except ValueError:
            return value
    return value


def carries_text(value: Any) -> bool:
    """Whether a value, or one nested inside it, is a text that is not blank."""
    if isinstance(value, str):
        return not value.isspace() and value != ""
    if isinstance(value, dict):
        return any(map(carries_text, value.values()))
    return isinstance(value, list) and any(map(carries_text, value))


def unread(record: dict, used: Any) -> list[str]:
    """The fields of a record that carry text and are not among those `used`."""
    return [
        field
        for field, value in record.items()
        if field not in used and field not in _NAMES_OF_RECORDS and carries_text(value)
    ]


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
        record: one record of a data file.
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

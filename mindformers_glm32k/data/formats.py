"""What a record may look like: each layout turns a record into a sample, or says what is wrong with it.

A sample is one of three: a `Sample` (one question with its answer), a `Chat` (any number of turns) or a `Text`
(no roles at all, for continued training).
"""

import difflib
from dataclasses import dataclass
from typing import Optional

from mindformers_glm32k.errors import InputError

RENAME = "set origin_columns if the columns have other names"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role (str): "system", "user", "assistant" or "observation".
        content (str): the text.
        metadata (str): the rest of the role's line; the tool's name where an assistant calls one.
        learnt (bool): whether the content and the token that ends it have a part in the loss.
        context (tuple[int, int] | None): where in `content`, in characters, the long document stands.
    """

    role: str
    content: str
    metadata: str = ""
    learnt: bool = False
    context: Optional[tuple[int, int]] = None


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        prompt (str): what the user says, question included.
        answer (str): what the model is to answer.
        context (tuple[int, int]): where in `prompt`, in characters, the long document stands. Cuts fall inside it.
    """

    prompt: str
    answer: str
    context: tuple[int, int]

    def turns(self):
        """tuple[Turn, Turn]: the same as a conversation."""
        return Turn("user", self.prompt, context=self.context), Turn("assistant", self.answer, learnt=True)


@dataclass(frozen=True)
class Chat:
    """A conversation; at least one of its turns is learnt.

    Attributes:
        messages (tuple[Turn]): in their order.
    """

    messages: tuple[Turn, ...]

    def turns(self):
        """tuple[Turn]: the messages."""
        return self.messages


@dataclass(frozen=True)
class Text:
    """Plain text, all of it learnt.

    Attributes:
        text (str): not empty.
    """

    text: str


class AdGenLayout:
    """{"content": "…", "summary": "…"}; other fields are ignored, but for `context_span`.

    `context_span`, where it is there, is [start, stop]: where in the first field, in characters, the long document
    stands. `glm32k preprocess` writes it.

    Args:
        columns (tuple[str, str]): the names of the two fields.
    """

    name = "adgen"

    def __init__(self, columns):
        self.fields = tuple(columns)

    def matches(self, record):
        """bool: whether a record has this layout's fields."""
        return all(field in record for field in self.fields)

    def sample(self, record):
        """Turns a record into a Sample; InputError (without the place) when a field is missing or no text."""
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

    Args:
        prompts (PromptTemplates | None): None only where the layout is asked what it matches.
    """

    name = "longbench"
    fields = ("input", "context", "answers", "dataset")

    def __init__(self, prompts):
        self.prompts = prompts

    def matches(self, record):
        """bool: whether a record has this layout's fields."""
        return all(field in record for field in self.fields)

    def sample(self, record):
        """Turns a record into a Sample; InputError (without the place) when a field is missing or wrong."""
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

    def matches(self, record):
        """bool: whether a record has this layout's field."""
        return "text" in record

    def sample(self, record):
        """Turns a record into a Text; InputError (without the place) when the field is missing, empty or no text."""
        return Text(text_field(record, "text", "plain text stands in the field 'text'"))


def layout_of(record, layouts):
    """The first layout that a record matches.

    Args:
        record (dict): the first record of a file.
        layouts (list): in order of preference.

    Returns:
        one of `layouts`

    Raises:
        InputError: none matches; the message lists the fields found and the fields known.
    """
    for layout in layouts:
        if layout.matches(record):
            return layout
    known = " or ".join(", ".join(layout.fields) for layout in layouts)
    missing = [field for layout in layouts for field in layout.fields if field not in record]
    near = [
        f"{field!r} looks like {match!r}"
        for field in record
        for match in difflib.get_close_matches(field, missing, n=1)
    ]
    raise InputError(
        f"has the fields {_names(record)}; needed are {known}"
        + (f" ({'; '.join(near)})" if near else "")
        + f"; {RENAME}"
    )


def _names(record):
    return ", ".join(map(repr, record)) or "(none)"


def text_field(record, field, hint, may_be_empty=False):
    """Returns the text (str) in a record's field.

    Args:
        record (dict)
        field (str): its name.
        hint (str): what to do when it is missing or no text.
        may_be_empty (bool): whether blank text is fine.

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

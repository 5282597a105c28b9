"""What a record may look like: each layout turns a record into a sample, or says what is wrong with it."""
import difflib
from dataclasses import dataclass
from typing import Tuple

from mindformers_glm32k.errors import InputError

_RENAME = "set origin_columns if the columns have other names"


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
    context: Tuple[int, int]


class AdGenLayout:
    """{"content": "…", "summary": "…"}; other fields are ignored.

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
        prompt, answer = (_text(record, field, _RENAME) for field in self.fields)
        return Sample(prompt, answer, (0, len(prompt)))


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
        _text(record, "context", hint)
        _text(record, "dataset", hint)
        _text(record, "input", hint, may_be_empty=True)
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers:
            found = "missing" if "answers" not in record else f"{answers!r:.60}"
            raise InputError(f"field 'answers' is {found}; a list with at least one text is needed")
        answer = _text({"answers[0]": answers[0]}, "answers[0]", "a row needs an answer to learn")
        prompt, context = self.prompts.render(record)
        return Sample(prompt, answer, context)


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
    near = [f"{field!r} looks like {match!r}"
            for field in record for match in difflib.get_close_matches(field, missing, n=1)]
    raise InputError(f"has the fields {_names(record)}; needed are {known}"
                     + (f" ({'; '.join(near)})" if near else "") + f"; {_RENAME}")


def _names(record):
    return ", ".join(map(repr, record)) or "(none)"


def _text(record, field, hint, may_be_empty=False):
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
            raise InputError(f"column {field!r} has half a surrogate pair at character {error.start}, "
                             "which no tokenizer can read; mend the text") from error
    return value

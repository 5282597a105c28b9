"""Records of one question with its answer as other projects write them: Alpaca's, and query with response."""

from __future__ import annotations

from mindformers_glm32k.data.formats import (
    BESIDE,
    RENAME,
    Chat,
    Sample,
    after_history,
    carries_text,
    text_field,
    unread,
)
from mindformers_glm32k.errors import InputError


class QuestionLayout:
    """{"query": "…", "response": "…", "system": "…", "history": [["…", "…"], …]}, the last two where they are given.

    Sources: the custom-dataset pages of LLaMA-Factory, ms-swift and ChatGLM2; every answer of `history` is learnt, as
    all three do.

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
        """InputError (without the location) when a field is missing or no text."""
        asked = (self.question, *(field for field in self.details if record.get(field) is not None))
        texts = [text_field(record, field, RENAME, may_be_empty=True) for field in asked]
        prompt = "\n".join(text for text in texts if carries_text(text))
        if not prompt:
            raise InputError(f"column {self.question!r} is empty; fill it or remove the line")
        answer = text_field(record, self.answer, RENAME)
        return after_history(record, Sample(prompt, answer, (0, len(prompt))))

    def unused(self, record: dict) -> list[str]:
        """Names of the fields that carry text which no sample has."""
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

"""Prompt templates in the format of LongBench's dataset2prompt.json: {data set: "… {context} … {input} …"}."""

from __future__ import annotations

import os
import string

from mindformers_glm32k.checks import parse_json
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import require_file

CONTEXT = "context"  # the field that holds the long document
_HINT = "It maps each data set's name to its prompt, as LongBench's config/dataset2prompt.json does."


def plain_name(dataset: str) -> str:
    """The data set's name without LongBench-E's ending `_e`; both have the same prompt and metric."""
    return dataset[:-2] if dataset.endswith("_e") else dataset


class PromptTemplate:
    """One prompt in str.format's syntax, with plain field names only.

    Args:
        text: the template.
        what: what it is, for messages ("the prompt of 'trec'").

    Raises:
        InputError: no text, an unbalanced brace, or a field without a plain name.
    """

    def __init__(self, text: str, what: str):
        self._what = what
        if not isinstance(text, str):
            raise InputError(f"{what} is {type(text).__name__}, not a text")
        self.text = text
        try:
            self._pieces = [(literal, field) for literal, field, _, _ in string.Formatter().parse(text)]
        except ValueError as error:
            raise InputError(
                f"{what} has a wrong brace ({error}); write {{{{ or }}}} for a brace in the text"
            ) from error
        wrong = [field for _, field in self._pieces if field is not None and not field.isidentifier()]
        if wrong:
            raise InputError(
                f"{what} has the field {{{wrong[0]}}}; "
                "write {context}, {input} or another field's name, or {{ }} for braces in the text"
            )

    def render(self, record: dict) -> tuple[str, tuple[int, int]]:
        """Fills the fields in, as `template.format(**record)` does; InputError for one that is missing or no text.

        Returns:
            the prompt and where in it, in characters, the context stands (all of it where the template has no
            {context}).
        """
        text, span = "", None
        for literal, field in self._pieces:
            text += literal
            if field is None:
                continue
            value = record.get(field)
            if not isinstance(value, str):
                found = "missing" if field not in record else f"{type(value).__name__}, not a text"
                raise InputError(f"field {field!r} is {found}, and {self._what} needs it")
            if field == CONTEXT and span is None:
                span = (len(text), len(text) + len(value))
            text += value
        return text, span or (0, len(text))


class PromptTemplates:
    """The prompts of a JSON file by data set; InputError where there is none, or a wrong template in it."""

    def __init__(self, path: str | os.PathLike):
        self.path = require_file(path, "prompt file", _HINT)
        try:
            templates = parse_json(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"prompt file {self.path}: not JSON ({error}). {_HINT}") from error
        if not isinstance(templates, dict) or not templates:
            raise InputError(f"prompt file {self.path}: a JSON object is needed. {_HINT}")
        self._templates = {
            name: PromptTemplate(text, f"prompt file {self.path}: the prompt of {name!r}")
            for name, text in templates.items()
        }

    def render(self, record: dict) -> tuple[str, tuple[int, int]]:
        """The prompt of one LongBench record and where its context stands; see `PromptTemplate.render`."""
        return self.template(record["dataset"]).render(record)

    def template(self, dataset: str) -> PromptTemplate:
        """That of a data set; InputError, with the names there are, for one without."""
        # LongBench-E names its files hotpotqa_e; the prompts are those of hotpotqa.
        for name in (dataset, plain_name(dataset)):
            if name in self._templates:
                return self._templates[name]
        raise InputError(
            f"no prompt for the data set {dataset!r} in {self.path}, which has {', '.join(self._templates)}; add one"
        )

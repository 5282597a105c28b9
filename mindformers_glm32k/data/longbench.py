"""LongBench in training data: prompt templates by data set, splits by document, and the manifest that
tells which test samples a model was trained on."""

from __future__ import annotations

import hashlib
import json
import os
import string
from pathlib import Path
from typing import Any

from mindformers_glm32k.checks import parse_json
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file

CONTEXT = "context"  # the field that holds the long document
_HINT = "It maps each data set's name to its prompt, as LongBench's config/dataset2prompt.json does."
_MANIFEST_VERSION = 1
TEST_SETS = frozenset(
    "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader gov_report qmsum multi_news "
    "vcsum trec triviaqa samsum lsht passage_count passage_retrieval_en passage_retrieval_zh lcc repobench-p".split()
)
LOUD = (
    "THE MODEL IS TRAINED ON LONGBENCH'S TEST SET. LongBench has test sets only: scores on the records that were "
    "trained on say nothing about the model. "
)


def plain_name(dataset: str) -> str:
    """The data set's name without LongBench-E's suffix `_e`; both have the same prompt and metric."""
    return dataset[:-2] if dataset.endswith("_e") else dataset


class PromptTemplate:
    """One prompt in str.format's syntax, with plain field names only.

    Args:
        text: the template.
        what: its name in messages ("the prompt of 'trec'").

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
            the prompt, and the span of the context in it, in characters (the whole prompt where the template has no
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
    """Prompt templates by data set, from a JSON file; InputError where it is missing or a template is wrong."""

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
        """The prompt of one LongBench record and the span of its context; see `PromptTemplate.render`."""
        return self.template(record["dataset"]).render(record)

    def template(self, dataset: str) -> PromptTemplate:
        """The template of a data set; InputError, with the known names, where it has none."""
        # LongBench-E names its files hotpotqa_e; the prompts are those of hotpotqa.
        for name in (dataset, plain_name(dataset)):
            if name in self._templates:
                return self._templates[name]
        raise InputError(
            f"no prompt for the data set {dataset!r} in {self.path}, which has {', '.join(self._templates)}; add one"
        )


def document_key(context: str, seed: int = 0) -> bytes:
    """A hash of a document, 16 bytes: the same for the same seed and text (white space at its ends aside). Other seeds
    give unrelated keys.
    """
    return hashlib.blake2b(
        context.strip().encode("utf-8", "surrogatepass"), digest_size=16, key=str(seed).encode("ascii")
    ).digest()


def is_held_out(context: str, fraction: float, seed: int = 0) -> bool:
    """Whether a document belongs to the held-out `fraction` (0 to 1, met on average) of all documents.

    It depends on the text and the seed alone, so that records of one document fall on the same side in every
    file, also after other records change.
    """
    return int.from_bytes(document_key(context, seed)[:8], "big") < fraction * 2**64


def is_test_set(dataset: Any) -> bool:
    """Whether a value is the name of one of LongBench's data sets, or LongBench-E's (`trec_e`)."""
    return isinstance(dataset, str) and plain_name(dataset) in TEST_SETS


def manifest_path(records: str | os.PathLike) -> Path:
    """The path of the manifest of a file of records."""
    records = Path(records)
    return records.with_name(f"{records.stem}.manifest.json")


class Manifest:
    """Which samples went into training and which were held out; a JSON file beside the records.

        {"version": 1, "holdout": 0.1, "seed": 0,
         "trained": {data set: [_id, …]}, "held_out": {data set: [_id, …]}, "trained_documents": ["32 hex digits", …]}

    Documents are listed because LongBench, LongBench-E and some of their data sets share texts under different `_id`s:
    the text contaminates a score, whatever its `_id`.

    Args:
        holdout: fraction of the documents that is held out.
        seed: of the choice of documents.
    """

    def __init__(self, holdout: float = 0.0, seed: int = 0):
        self.holdout, self.seed = holdout, seed
        self.trained, self.held_out = {}, {}  # data set -> _ids
        self._documents, self._ids = set(), None

    def add(self, record: dict, held_out: bool) -> None:
        """Notes one record (with dataset, context and, where it has one, `_id`)."""
        self._ids = None
        ids = (self.held_out if held_out else self.trained).setdefault(record["dataset"], [])
        if record.get("_id") is not None:
            ids.append(record["_id"])
        if not held_out:
            self._documents.add(document_key(record["context"]))

    def is_contaminated(self, record: dict) -> bool:
        """Whether a LongBench record was trained on: its `_id` in any data set, or its document under another `_id`.

        A record has `context` and may have `_id`; a prediction has `document`, the hex `document_key`, in its place."""
        if self._ids is None:
            self._ids = {identifier for ids in self.trained.values() for identifier in ids}
        if record.get("_id") in self._ids:
            return True
        if "context" in record:
            return document_key(record["context"]) in self._documents
        return bytes.fromhex(record.get("document", "")) in self._documents

    def write(self, path: str | os.PathLike) -> None:
        """Writes the file, whole or not at all."""
        content = {
            "version": _MANIFEST_VERSION,
            "holdout": self.holdout,
            "seed": self.seed,
            "trained": self.trained,
            "held_out": self.held_out,
            "trained_documents": sorted(key.hex() for key in self._documents),
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike) -> Manifest:
        """Reads what `write` wrote; InputError where the file is missing or no manifest."""
        path = require_file(path, "manifest", "`glm32k preprocess` writes one beside its records.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != _MANIFEST_VERSION:
                raise ValueError(f"version {content['version']!r}, this program knows {_MANIFEST_VERSION}")
            manifest = cls(content["holdout"], content["seed"])
            manifest.trained = {name: list(ids) for name, ids in content["trained"].items()}
            manifest.held_out = {name: list(ids) for name, ids in content["held_out"].items()}
            manifest._documents = {bytes.fromhex(key) for key in content["trained_documents"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"manifest {path}: not one that `glm32k preprocess` wrote ({error!r})") from error
        return manifest

"""Splits by document, and what keeps scores on LongBench honest: its test sets in a model's training data."""

import hashlib
import json
from pathlib import Path

from mindformers_glm32k.data.prompts import plain_name
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file

VERSION = 1
TEST_SETS = frozenset(
    (
        "narrativeqa",
        "qasper",
        "multifieldqa_en",
        "multifieldqa_zh",
        "hotpotqa",
        "2wikimqa",
        "musique",
        "dureader",
        "gov_report",
        "qmsum",
        "multi_news",
        "vcsum",
        "trec",
        "triviaqa",
        "samsum",
        "lsht",
        "passage_count",
        "passage_retrieval_en",
        "passage_retrieval_zh",
        "lcc",
        "repobench-p",
    )
)
LOUD = (
    "THE MODEL IS TRAINED ON LONGBENCH'S TEST SET. LongBench has test sets only: scores on the rows that were "
    "trained on say nothing about the model. "
)


def document_key(context, seed=0):
    """bytes: 16 that stand for a document, the same for the same text (blank space at its ends apart) and seed.

    Args:
        context (str): the document.
        seed (int): other seeds give other, unrelated keys.
    """
    return hashlib.blake2b(
        context.strip().encode("utf-8", "surrogatepass"), digest_size=16, key=str(seed).encode("ascii")
    ).digest()


def is_held_out(context, fraction, seed=0):
    """bool: whether a document belongs to the held-out part. It depends on the text and the seed alone, so that rows
    of one document fall on the same side whatever file they are in, and however the files change around them.

    Args:
        context (str): the document.
        fraction (float): the part of all documents to hold out, 0 <= fraction <= 1, met on average.
        seed (int): determines which ones.
    """
    return int.from_bytes(document_key(context, seed)[:8], "big") < fraction * 2**64


def is_test_set(dataset):
    """bool: whether a value is the name of one of LongBench's data sets, or LongBench-E's (`trec_e`)."""
    return isinstance(dataset, str) and plain_name(dataset) in TEST_SETS


def manifest_path(rows):
    """Path: where the manifest of a file of rows is.

    Args:
        rows (str | os.PathLike): the file of rows.
    """
    rows = Path(rows)
    return rows.with_name(f"{rows.stem}.manifest.json")


def contamination_warning(source):
    """What to say when files are read for training.

    Args:
        source (SampleSource): the samples.

    Returns:
        list[str]: one loud sentence where there are samples of LongBench among them, in its own files or in rows of
        which nothing was held out; else nothing.
    """
    names = [
        path
        for path, dataset in source.longbench_files()
        if is_test_set(dataset) and not (manifest_path(path).is_file() and Manifest.read(manifest_path(path)).holdout)
    ]
    return (
        [
            LOUD + f"Files: {', '.join(names)}. `glm32k preprocess --holdout 0.1` splits them by document and notes "
            "which rows were trained on."
        ]
        if names
        else []
    )


class Manifest:
    """Which samples went into training and which were held out; a JSON file beside the rows.

        {"version": 1, "holdout": 0.1, "seed": 0,
         "trained": {data set: [_id, …]}, "held_out": {data set: [_id, …]}, "trained_documents": ["32 hex digits", …]}

    The documents are there because LongBench and LongBench-E, and some data sets among each other, share texts under
    different `_id`s: a score is contaminated by the text, whatever its number.

    Args:
        holdout (float): the part of the documents that was held out.
        seed (int): that chose it.
    """

    def __init__(self, holdout=0.0, seed=0):
        self.holdout, self.seed = holdout, seed
        self.trained, self.held_out = {}, {}  # data set -> _ids
        self._documents, self._ids = set(), None

    def add(self, record, held_out):
        """Notes one record (dict with dataset, context and, where it has one, `_id`)."""
        self._ids = None
        ids = (self.held_out if held_out else self.trained).setdefault(record["dataset"], [])
        if record.get("_id") is not None:
            ids.append(record["_id"])
        if not held_out:
            self._documents.add(document_key(record["context"]))

    def is_contaminated(self, record):
        """bool: whether a LongBench record (dict with context, and `_id` where it has one) was trained on: under its
        `_id` in whatever data set, or under another one with the same document. A prediction has, in place of the
        context, `document`: its `document_key` in hex digits."""
        if self._ids is None:
            self._ids = {identifier for ids in self.trained.values() for identifier in ids}
        if record.get("_id") in self._ids:
            return True
        if "context" in record:
            return document_key(record["context"]) in self._documents
        return bytes.fromhex(record.get("document", "")) in self._documents

    def write(self, path):
        """Writes the file, whole or not at all."""
        content = {
            "version": VERSION,
            "holdout": self.holdout,
            "seed": self.seed,
            "trained": self.trained,
            "held_out": self.held_out,
            "trained_documents": sorted(key.hex() for key in self._documents),
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path):
        """Reads what `write` wrote.

        Args:
            path (str | os.PathLike)

        Returns:
            Manifest

        Raises:
            InputError: no such file, or no manifest.
        """
        path = require_file(path, "manifest", "`glm32k preprocess` writes one beside its rows.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!r}, this program knows {VERSION}")
            manifest = cls(content["holdout"], content["seed"])
            manifest.trained = {name: list(ids) for name, ids in content["trained"].items()}
            manifest.held_out = {name: list(ids) for name, ids in content["held_out"].items()}
            manifest._documents = {bytes.fromhex(key) for key in content["trained_documents"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"manifest {path}: not one that `glm32k preprocess` wrote ({error!r})") from error
        return manifest

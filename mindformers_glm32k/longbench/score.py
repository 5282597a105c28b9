"""Scores of predictions as LongBench's eval.py computes them, with what it omits: confidence intervals, missing
predictions, and samples that were trained on."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np

from mindformers_glm32k.data.longbench import Manifest
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.longbench.metrics import score_row
from mindformers_glm32k.longbench.predictions import check_prediction, read_predictions

SCORES = "scores.json"
BUCKETS = ("0-4k", "4-8k", "8k+")  # of LongBench-E, by the field `length`
RESAMPLES = 2000
_RECURSION = 1000  # Python's own limit, at which eval.py's ROUGE-L gives up; see metrics.py
_LOOP_PERIOD, _LOOP_TIMES, _LOOP_LEAST = 200, 4, 24  # characters, repetitions, characters in all


def bucket(length: int) -> str:
    """LongBench-E's bucket of a length in words (Chinese: characters)."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def score_rows(dataset: str, rows: list[dict]) -> dict:
    """Scores the rows of one data set as eval.py does.

    Args:
        dataset: its name; LongBench-E's `trec_e` is scored as `trec`.
        rows: each has `pred`, `answers`, `all_classes` and `length`.

    Returns:
        {"score": float, "score_e": {"0-4k": float | None, "4-8k": …, "8k+": …}} in percent, rounded to two decimals as
        eval.py does; None for an empty bucket.

    Raises:
        InputError: no rows, or a row without a field that the metric needs.
    """
    return rounded(row_scores(dataset, rows), [row["length"] for row in rows])


def rounded(scores: list[float], lengths: list[int]) -> dict:
    """The result of `score_rows`, from the rows' scores (0 to 1) and lengths."""
    by_bucket = {name: [score for score, length in zip(scores, lengths) if bucket(length) == name] for name in BUCKETS}
    return {
        "score": round(100 * sum(scores, 0.0) / len(scores), 2),
        # NumPy's mean and rounding, which eval.py uses here and not above
        "score_e": {name: float(round(100 * np.mean(part), 2)) if part else None for name, part in by_bucket.items()},
    }


def row_scores(dataset: str, rows: list[dict]) -> list[float]:
    """The score of each row, 0 to 1; the classes are those of the last row, as in eval.py. Raises as `score_rows`."""
    if not rows:
        raise InputError(f"{dataset}: no predictions to score")
    for index, row in enumerate(rows, 1):
        check_prediction(row, f"{dataset}: prediction {index}")

    def scores():
        result = []
        for index, row in enumerate(rows, 1):
            try:
                result.append(score_row(dataset, row, rows[-1]["all_classes"]))
            except InputError as error:
                raise InputError(f"{dataset}: prediction {index}: {error}") from error
        return result

    return _with_a_stack_of_its_own(scores)


def _with_a_stack_of_its_own(work: Callable[[], list]) -> list:
    """Calls `work` in a new thread with an empty stack: where ROUGE-L hits the recursion limit must not depend on the
    caller's depth or on a limit that a library has raised."""
    results, limit = [], sys.getrecursionlimit()

    def call():
        try:
            results.append((work(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=call)
    sys.setrecursionlimit(_RECURSION)
    try:
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
    result, error = results[0]
    if error is not None:
        raise error
    return result


def loops(text: str) -> bool:
    """Whether a text ends in a repetition: some 1 to 200 characters four times or more, 24 characters in all."""
    return any(
        text[-period * _LOOP_TIMES :] == text[-period:] * _LOOP_TIMES
        for period in range(-(-_LOOP_LEAST // _LOOP_TIMES), min(_LOOP_PERIOD, len(text) // _LOOP_TIMES) + 1)
    )


def interval(samples: np.ndarray) -> list[float]:
    """95 % interval (2.5th and 97.5th percentile) of bootstrap samples (0 to 1), in percent."""
    return [float(round(value, 2)) for value in np.percentile(100 * samples, [2.5, 97.5])]


def resample(values: np.ndarray) -> np.ndarray:
    """(RESAMPLES,) means of rows drawn with replacement, always the same for the same values."""
    rng, size = np.random.default_rng(0), len(values)
    chunks = [values[rng.integers(0, size, (100, size))].mean(axis=1) for _ in range(RESAMPLES // 100)]
    return np.concatenate(chunks)  # (100, size) at a time: few MB


@dataclass
class DatasetScores:
    """Scores of one data set's predictions.

    Attributes:
        rows: the scored predictions; `scores`: float (len(rows),), 0 to 1.
        expected: number of rows of the data set; None where unknown.
        trained: how many rows the manifest says were trained on, left out or not.
        left_out: how many of them are not scored.
        unknown: rows that cannot be looked up in the manifest.
        doubles: lines with an `_id` that stands before, not scored.
        torn: whether the last line is half a line, as a killed process leaves it.
        stamps: the different stamps of the lines.
    """

    dataset: str
    rows: list[dict]
    scores: np.ndarray
    expected: int | None
    trained: int = 0
    left_out: int = 0
    unknown: int = 0
    doubles: int = 0
    torn: bool = False
    stamps: list[dict] = field(default_factory=list)
    _samples: np.ndarray | None = None

    @property
    def language(self) -> str:
        return self.rows[0].get("language") or "en"

    @property
    def score(self) -> float:
        """In percent, as eval.py rounds it."""
        return rounded(self.scores.tolist(), self.lengths)["score"]

    @property
    def lengths(self) -> list[int]:
        return [row["length"] for row in self.rows]

    @property
    def samples(self) -> np.ndarray:
        """(RESAMPLES,) bootstrap samples of the score, 0 to 1."""
        if self._samples is None:
            self._samples = resample(self.scores)
        return self._samples

    @property
    def complete(self) -> bool | None:
        """Whether every row of the data set is scored or left out on request; None where their number is not known."""
        return None if self.expected is None else len(self.rows) + self.left_out >= self.expected

    def summary(self) -> dict:
        """The entry of the data set in scores.json."""
        predictions = [row["pred"] for row in self.rows]
        return {
            **rounded(self.scores.tolist(), self.lengths),
            "interval": interval(self.samples),
            "rows": len(self.rows),
            "expected": self.expected,
            "complete": self.complete,
            "trained_on": self.trained,
            "left_out": self.left_out,
            "doubles": self.doubles,
            "empty": sum(not text.strip() for text in predictions),
            "loops": sum(map(loops, predictions)),
        }


@dataclass
class RunScores:
    """Scores of one folder of predictions.

    Attributes:
        datasets: those with rows to score, by name.
        absent: names of data sets without any prediction.
        all_trained: names of data sets of which every row is left out, because it was trained on.
    """

    folder: Path
    datasets: dict[str, DatasetScores]
    absent: list[str] = field(default_factory=list)
    all_trained: list[str] = field(default_factory=list)

    def write(self) -> Path:
        """Writes scores.json into the folder; returns its path."""
        path = self.folder / SCORES
        content = {name: scores.summary() for name, scores in self.datasets.items()}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return path

    def warnings(self) -> list[str]:
        """What a reader of the scores must know: what is incomplete, trained on, or mixed."""
        lines = [f"{name}: NO PREDICTIONS" for name in self.absent]
        lines += [f"{name}: every row was trained on, says the manifest; no score is left" for name in self.all_trained]
        for name, scores in self.datasets.items():
            if scores.complete is False:
                lines.append(f"{name}: INCOMPLETE, {len(scores.rows)} of {scores.expected} rows are scored")
            if scores.trained > scores.left_out:
                lines.append(
                    f"{name}: TRAINED ON {scores.trained} of the rows, says the manifest; --exclude_trained leaves "
                    "them out"
                )
            if scores.unknown:
                lines.append(f"{name}: {scores.unknown} lines have no _id; whether they were trained on is not known")
            if scores.torn:
                lines.append(f"{name}: the last line is half a line and is not scored; predict writes it again")
            if scores.doubles:
                lines.append(f"{name}: {scores.doubles} lines repeat an _id and are not scored")
            if len(scores.stamps) > 1:
                lines.append(f"{name}: MIXED, the lines have {len(scores.stamps)} different stamps")
        unknown = [name for name, scores in self.datasets.items() if scores.complete is None]
        if unknown:
            which = "" if len(unknown) == len(self.datasets) else f" of {', '.join(unknown)}"
            lines.append(f"whether all rows are there is not known{which}; --data tells")
        return lines


def score_folder(
    folder: str | Path, expected: dict[str, int] | None = None, manifest: Manifest | None = None, exclude: bool = False
) -> RunScores:
    """Scores all predictions of a folder.

    Args:
        folder: has a file DATASET.jsonl for each data set, of `glm32k longbench predict` or of LongBench's pred.py.
        expected: number of rows by data set; where missing, that of the lines' stamps.
        manifest: says which rows were trained on.
        exclude: whether these are left out.

    Raises:
        InputError: no folder, no predictions in it, or a damaged line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--predictions {folder}: no such folder; `glm32k longbench predict` writes one")
    files = sorted(path for path in folder.glob("*.jsonl") if path.is_file())
    found = {path.stem: _score_file(path, expected or {}, manifest, exclude) for path in files}
    if not any(scores.rows or scores.left_out for scores in found.values()):
        raise InputError(f"--predictions {folder}: no predictions in it; files are named DATASET.jsonl")
    datasets = {name: scores for name, scores in found.items() if scores.rows}
    return RunScores(
        folder,
        datasets,
        [
            name
            for name in {**found, **(expected or {})}
            if name not in datasets and not (name in found and found[name].left_out)
        ],
        [name for name, scores in found.items() if not scores.rows and scores.left_out],
    )


def _score_file(path, expected, manifest, exclude):
    dataset = path.stem
    rows, doubles, torn = read_predictions(path)
    trained = [manifest is not None and manifest.is_contaminated(row) for row in rows]
    kept = [row for row, flag in zip(rows, trained) if not (flag and exclude)]
    stamps = {json.dumps(row["stamp"], sort_keys=True): row["stamp"] for row in rows if "stamp" in row}
    stamped = {stamp.get("samples") for stamp in stamps.values()}
    return DatasetScores(
        dataset=dataset,
        rows=kept,
        scores=np.array(row_scores(dataset, kept) if kept else []),
        expected=expected.get(dataset, stamped.pop() if len(stamped) == 1 else None),
        trained=sum(trained),
        left_out=len(rows) - len(kept),
        unknown=sum("_id" not in row and "document" not in row for row in rows) if manifest else 0,
        doubles=doubles,
        torn=torn,
        stamps=list(stamps.values()),
    )

"""Means over data sets as LongBench's leaderboard takes them, scores by length and depth, and runs side by side;
a run as a plain table for the terminal."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_glm32k.data.longbench import is_test_set, plain_name
from mindformers_glm32k.longbench.score import BUCKETS, DatasetScores, RunScores, interval, resample

CATEGORIES = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
OF_E = (
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
LANGUAGES = {"en": "English", "zh": "Chinese"}  # the two code data sets count in both, as in the leaderboard
_HEAD = ("data set", "score", "95 % interval", "rows", *BUCKETS, "empty", "loops", "trained on")
RETRIEVAL = ("passage_retrieval_en", "passage_retrieval_zh", "kv_retrieval")
ORDER = [name for names in CATEGORIES.values() for name in names]
DEPTHS = 5  # rows of the map of retrieval
_BINS = 5  # columns of it, and bars by length


@dataclass(frozen=True)
class Figure:
    """A score and its 95 % bootstrap interval, in percent; `rows`: number of predictions behind it."""

    score: float
    interval: tuple[float, float]
    rows: int


@dataclass(frozen=True)
class Difference:
    """This run minus another, in percent; `beyond` says whether the 95 % interval excludes 0.

    Where both runs have the same rows, the bootstrap draws paired differences, which are less noisy than two means.
    """

    value: float
    interval: tuple[float, float]
    beyond: bool
    paired: bool


@functools.cache
def published() -> dict:
    """The published scores: `model`, `source`, `scores` by data set."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def kinds(run: RunScores) -> dict[str, list[str]]:
    """Names of the run's data sets by benchmark, in the leaderboard's order."""
    result: dict[str, list[str]] = {}
    for name in sorted(run.datasets, key=_place):
        result.setdefault(_kind(name), []).append(name)
    return {kind: result[kind] for kind in ("LongBench", "LongBench-E", "other data sets") if kind in result}


def _kind(name):
    if not is_test_set(name):
        return "other data sets"
    return "LongBench-E" if name.endswith("_e") else "LongBench"


def _place(name):
    plain = plain_name(name)
    return (ORDER.index(plain) if plain in ORDER else len(ORDER), name)


def figure(scores: DatasetScores) -> Figure:
    """The score of one data set."""
    low, high = interval(scores.samples)
    return Figure(scores.score, (low, high), len(scores.rows))


@dataclass(frozen=True)
class Mean:
    """A mean of the leaderboard: the mean over groups of each group's mean over its data sets.

    Attributes:
        title: says how many data sets there are, where some are missing.
        overall: whether it is that of all categories.
    """

    title: str
    language: str
    groups: list[list[str]]
    overall: bool
    whole: bool


def means(names: list[str]) -> list[Mean]:
    """The means by category and over all categories, for each language of these data sets."""
    result = []
    is_e = all(name.endswith("_e") for name in names)
    for language, title in LANGUAGES.items():
        groups, wanted = [], 0
        for category, members in CATEGORIES.items():
            members = [
                name
                for name in members
                if (category == "code" or (name in CHINESE) == (language == "zh")) and (name in OF_E or not is_e)
            ]
            there = [name for name in names if plain_name(name) in members]
            wanted += len(members)
            if there:
                groups.append(there)
            if there and category != "code":
                result.append(_mean(f"{category}, {title}", title, [there], len(members), False))
            elif there and language == "en":
                result.append(_mean(category, title, [there], len(members), False))
        if any(plain_name(name) not in CATEGORIES["code"] for group in groups for name in group):
            result.append(_mean(f"all, {title}", title, groups, wanted, True))
    return result


def _mean(title, language, groups, wanted, overall):
    count = sum(map(len, groups))
    return Mean(
        title if count == wanted else f"{title} ({count} of {wanted})", language, groups, overall, count == wanted
    )


def mean(run: RunScores, groups: list[list[str]]) -> Figure | None:
    """The mean of group means with its interval; None where the run lacks one of the data sets."""
    if any(name not in run.datasets for group in groups for name in group):
        return None
    scores = [[run.datasets[name].score for name in group] for group in groups]
    samples = np.mean([np.mean([_samples(run, name) for name in group], axis=0) for group in groups], axis=0)
    low, high = interval(samples)
    rows = sum(len(run.datasets[name].rows) for group in groups for name in group)
    return Figure(float(round(np.mean([np.mean(group) for group in scores]), 2)), (low, high), rows)


def _samples(run, name):
    """Bootstrap samples of one data set, shuffled by its name: drawn with one seed, all would be correlated."""
    seed = sum(name.encode())
    return np.random.default_rng(seed).permutation(run.datasets[name].samples)


def published_mean(groups: list[list[str]]) -> float | None:
    """The same mean of the published scores; None where one is not published."""
    scores = published()["scores"]
    if any(name not in scores for group in groups for name in group):
        return None
    return float(np.mean([np.mean([scores[name] for name in group]) for group in groups]))


def difference(run: RunScores, other: RunScores, groups: list[list[str]]) -> Difference | None:
    """This run minus another over the same groups of data sets; None where one lacks a data set."""
    names = [name for group in groups for name in group]
    if any(name not in run.datasets or name not in other.datasets for name in names):
        return None
    drawn = {name: _dataset_difference(run.datasets[name], other.datasets[name]) for name in names}
    value = np.mean([np.mean([drawn[name][0] for name in group]) for group in groups])
    samples = np.mean([np.mean([drawn[name][1] for name in group], axis=0) for group in groups], axis=0)
    low, high = interval(samples)
    return Difference(
        float(round(100 * value, 2)), (low, high), low > 0 or high < 0, all(drawn[name][2] for name in names)
    )


def _dataset_difference(mine, other):
    """(mean difference, -1 to 1; its bootstrap samples; whether it is over paired rows)."""
    by_key = {row.get("_id"): score for row, score in zip(other.rows, other.scores)}
    keys = [row.get("_id") for row in mine.rows]
    common = [index for index, key in enumerate(keys) if key is not None and key in by_key]
    rng = np.random.default_rng(sum(mine.dataset.encode()))
    if not common:
        samples = rng.permutation(mine.samples) - rng.permutation(other.samples)
        return mine.scores.mean() - other.scores.mean(), samples, False
    pairs = np.array([mine.scores[index] - by_key[keys[index]] for index in common])
    return pairs.mean(), rng.permutation(resample(pairs)), True


def length_bins(lengths: list[int]) -> list[tuple[int, int]]:
    """At most five bins [low, high) that hold all lengths: powers of two over a wide range, equal ones over a
    narrow range, a single one where all are about the same."""
    low, high = min(lengths), max(lengths) + 1
    if high - low <= max(low // 10, 1):
        return [(low, high)]
    if high >= 4 * max(low, 1):
        first, last = max(int(np.log2(max(low, 1))), 0), int(np.ceil(np.log2(high)))
        first = max(first, last - _BINS)
        edges = [0 if low < 2**first else 2**first, *(2**power for power in range(first + 1, last + 1))]
    else:
        count = min(_BINS, high - low)
        edges = [low + (high - low) * step // count for step in range(count + 1)]
    return list(zip(edges, edges[1:]))


def by_length(run: RunScores, names: list[str], bins: list[tuple[int, int]]) -> list[Figure | None]:
    """The mean over all rows of these data sets in each bin of length; None where a bin is empty."""
    lengths = np.concatenate([run.datasets[name].lengths for name in names if name in run.datasets] or [[]])
    scores = np.concatenate([run.datasets[name].scores for name in names if name in run.datasets] or [[]])
    result = []
    for low, high in bins:
        part = scores[(lengths >= low) & (lengths < high)]
        if len(part):
            samples = resample(part)
            result.append(Figure(float(round(100 * part.mean(), 2)), tuple(interval(samples)), len(part)))
        else:
            result.append(None)
    return result


def retrieval_map(run: RunScores, bins: list[tuple[int, int]]) -> list[list[Figure | None]] | None:
    """DEPTHS rows by depth of the answer in the document (0 to 20 %, …), a column for each bin of length.

    Of the retrieval data sets, LongBench-E's too. None where no row has a known depth.
    """
    cells: dict[tuple[int, int], list[float]] = {}
    for name, scores in run.datasets.items():
        if plain_name(name) not in RETRIEVAL:
            continue
        for row, score in zip(scores.rows, scores.scores):
            depth = row.get("answer_depth")
            column = next((index for index, (low, high) in enumerate(bins) if low <= row["length"] < high), None)
            if depth is not None and column is not None:
                cells.setdefault((min(int(depth * DEPTHS), DEPTHS - 1), column), []).append(float(score))
    if not cells:
        return None

    def cell(key):
        part = np.array(cells[key])
        return Figure(float(round(100 * part.mean(), 1)), tuple(interval(resample(part))), len(part))

    return [
        [cell((depth, column)) if (depth, column) in cells else None for column in range(len(bins))]
        for depth in range(DEPTHS)
    ]


def worst(scores: DatasetScores, count: int = 10) -> list[tuple[dict, float]]:
    """The rows with the lowest scores (0 to 1), below 1, the longest first among equals."""
    order = sorted(range(len(scores.rows)), key=lambda index: (scores.scores[index], -scores.lengths[index]))
    return [(scores.rows[index], float(scores.scores[index])) for index in order[:count] if scores.scores[index] < 1]


def table(run: RunScores) -> str:
    """A run's scores for the terminal: one line a data set, and below them the leaderboard's means."""
    lines: list[tuple[str, ...]] = [_HEAD]
    for names in kinds(run).values():
        for name in names:
            found = run.datasets[name].summary()
            lines.append(
                (
                    name,
                    f"{found['score']:.2f}",
                    "{:.1f} to {:.1f}".format(*found["interval"]),
                    rows_text(found),
                    *(number(found["score_e"][part]) for part in BUCKETS),
                    *(str(found[key] or "-") for key in ("empty", "loops", "trained_on")),
                )
            )
        for wanted in means(names):
            figure = mean(run, wanted.groups)
            lines.append(
                (wanted.title, f"{figure.score:.2f}", "{:.1f} to {:.1f}".format(*figure.interval), str(figure.rows))
                + ("",) * (len(_HEAD) - 4)
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def rows_text(found: dict) -> str:
    """The number of rows, as `N of M` where some are missing; M is `?` where it is not known."""
    if found["complete"]:
        return str(found["rows"])
    return f"{found['rows']} of {'?' if found['expected'] is None else found['expected']}"


def number(value: float | None) -> str:
    """A score, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"

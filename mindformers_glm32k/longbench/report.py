"""The content of a report: the first run's scores beside the published ones and those of other runs, as blocks that
html.py and markdown.py render."""

from __future__ import annotations

from dataclasses import dataclass

from mindformers_glm32k.longbench import summary
from mindformers_glm32k.longbench.score import BUCKETS, RunScores
from mindformers_glm32k.longbench.summary import number, rows_text

QUESTION, PREDICTION = 600, 1200  # characters shown of a text


@dataclass(frozen=True)
class Track:
    """Marks on a scale from 0 to 100: (run, its number in the legend or None for the published score, figure)."""

    marks: list[tuple[str, int | None, summary.Figure]]


@dataclass(frozen=True)
class Table:
    """Cells are texts or a `Track` (left out in Markdown); `strong`: indices of the rows in bold."""

    head: list[str]
    rows: list[list[str | Track]]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class HeatMap:
    """Cells by depth (from the start of the document) and length."""

    columns: list[str]
    rows: list[tuple[str, list[summary.Figure | None]]]


@dataclass(frozen=True)
class Answer:
    """One of the worst answers: `marks` says what is odd about it, `others` what other runs answered."""

    score: float
    length: int
    marks: list[str]
    question: str
    answers: list[str]
    prediction: str
    others: list[tuple[str, str]]


@dataclass(frozen=True)
class Answers:
    """The worst answers of one data set."""

    dataset: str
    worst: list[Answer]


@dataclass(frozen=True)
class Section:
    """A heading with notes and blocks below."""

    title: str
    notes: list[str]
    blocks: list[Table | HeatMap | Answers]


@dataclass(frozen=True)
class Report:
    """The whole report; `runs`: names in the order of the legend, the first is the one reported on."""

    title: str
    lead: list[str]
    warnings: list[str]
    runs: list[str]
    sections: list[Section]


def build(runs: dict[str, RunScores]) -> Report:
    """The report on the first of these runs, by name; the others are shown for comparison."""
    mine, run = next(iter(runs.items()))
    kinds = summary.kinds(run)
    sections = [_score_section(kind, names, runs) for kind, names in kinds.items()]
    sections += [_means_section(kind, names, runs) for kind, names in kinds.items() if summary.means(names)]
    sections.append(_bucket_section(kinds, run))
    sections.append(_length_section(runs))
    sections += _map_sections(runs)
    sections.append(_worst_section(kinds, runs))
    sections += _made_section(runs)
    warnings = [f"{name}: {line}" if len(runs) > 1 else line for name in runs for line in runs[name].warnings()]
    return Report(f"LongBench: {mine}", _lead(runs), warnings, list(runs), sections)


def _lead(runs):
    """The headline: how the first run compares, one sentence for each other run and for published means."""
    mine, run = next(iter(runs.items()))
    lines = []
    for name, other in list(runs.items())[1:]:
        common = [dataset for dataset in run.datasets if dataset in other.datasets]
        if not common:
            lines.append(f"{mine} and {name} have no data set in common.")
            continue
        overall = summary.difference(run, other, [common])
        better = [
            sign * difference.value > 0 and difference.beyond
            for sign in (1, -1)
            for difference in (summary.difference(run, other, [[dataset]]) for dataset in common)
        ]
        verdict = "beyond" if overall.beyond else "within"
        where = common[0] if len(common) == 1 else f"the mean of {len(common)} data sets"
        each = (
            f" Beyond chance, it is better in {sum(better[: len(common)])} and worse in {sum(better[len(common) :])} "
            "of them."
        )
        lines.append(
            f"{mine} scores {_signed(overall.value)} points against {name} in {where}: {verdict} what chance gives "
            f"(95 % interval {_range(overall.interval)}).{each if len(common) > 1 else ''}"
        )
    for found in summary.means(summary.kinds(run).get("LongBench", [])):
        wanted = summary.published_mean(found.groups)
        if found.overall and wanted is not None:
            mean = summary.mean(run, found.groups)
            lines.append(
                f"Mean of the {found.language} data sets: {mean.score:.1f} ({_range(mean.interval)}); "
                f"{summary.published()['model']} as published: {wanted:.1f}"
                f"{'' if found.whole else ' over the same data sets'}."
            )
    return lines


def _signed(value):
    return f"{value:+.1f}".replace("-", "−")


def _range(pair):
    return f"{pair[0]:.1f} to {pair[1]:.1f}".replace("-", "−")


def _against(figure, wanted):
    """A published score has no interval of its own: it is compared with the run's interval."""
    beyond = not figure.interval[0] <= wanted <= figure.interval[1]
    return f"{_signed(figure.score - wanted)}{' *' if beyond else ''}"


def _difference(run, other, groups):
    found = summary.difference(run, other, groups)
    return "-" if found is None else f"{_signed(found.value)}{' *' if found.beyond else ''}"


def _scores_head(runs, wanted, first):
    head = [first, "", "score", "95 %"]
    head += ["published", "difference"] if wanted else []
    for name in list(runs)[1:]:
        head += [name, "difference"]
    return head


def _scores_row(title, groups, runs, wanted, values):
    """One row of a table of scores: of a data set, or of a mean over groups of them."""
    run = next(iter(runs.values()))
    figures = {name: summary.mean(other, groups) for name, other in runs.items()}
    mine = next(iter(figures.values()))
    marks = [(name, index, figure) for index, (name, figure) in enumerate(figures.items()) if figure]
    if wanted is not None:
        marks.append(("published", None, summary.Figure(wanted, (wanted, wanted), 0)))
    row = [title, Track(marks), f"{mine.score:.2f}", _range(mine.interval)]
    if values:
        row += ["-", "-"] if wanted is None else [f"{wanted:.2f}", _against(mine, wanted)]
    for name, other in list(runs.items())[1:]:
        figure = figures[name]
        row += ["-" if figure is None else f"{figure.score:.2f}", _difference(run, other, groups)]
    return row


_STAR = (
    "The bars are 95 % intervals by bootstrap over the rows. A star marks a difference beyond chance: of two runs, "
    "from the differences row by row where both have the rows; of a published score, when it lies outside the interval."
)


def _score_section(kind, names, runs):
    wanted = summary.published()["scores"] if kind == "LongBench" else {}
    rows = [_scores_row(name, [[name]], runs, wanted.get(name), bool(wanted)) for name in names]
    notes = [_STAR]
    if wanted:
        notes.append(f"Published: {summary.published()['model']}, {summary.published()['source']}.")
    if kind == "other data sets":
        notes.append("LongBench does not have these: kv_retrieval counts exact answers, all others F1 of words.")
    return Section(
        kind.capitalize() if kind[0] == "o" else kind, notes, [Table(_scores_head(runs, wanted, "data set"), rows)]
    )


def _means_section(kind, names, runs):
    wanted = kind == "LongBench"
    means = summary.means(names)
    rows = [
        _scores_row(mean.title, mean.groups, runs, summary.published_mean(mean.groups) if wanted else None, wanted)
        for mean in means
    ]
    strong = frozenset(index for index, mean in enumerate(means) if mean.overall)
    note = "As in the leaderboard: the mean of the data sets of a category, and of the categories; code counts in both."
    return Section(
        f"{kind} by category and language", [note], [Table(_scores_head(runs, wanted, "mean of"), rows, strong)]
    )


def _bucket_section(kinds, run):
    head = ["data set", "rows", *BUCKETS, "empty", "loops", "trained on"]
    rows = []
    for name in (name for names in kinds.values() for name in names):
        found = run.datasets[name].summary()
        rows.append(
            [name, rows_text(found), *(number(found["score_e"][part]) for part in BUCKETS)]
            + [str(found[key] or "-") for key in ("empty", "loops", "trained_on")]
        )
    notes = [
        "Buckets as LongBench-E has them, in words (Chinese: characters). Empty: answers without a letter. Loops: "
        "answers that end in the same text four times or more. Trained on: rows that the training data's "
        "manifest names."
    ]
    return Section("By length bucket, and what to look at", notes, [Table(head, rows)])


def _lengths(runs):
    return [length for run in runs.values() for scores in run.datasets.values() for length in scores.lengths]


def _length_section(runs):
    bins = summary.length_bins(_lengths(runs))
    names = list(next(iter(runs.values())).datasets)
    figures = {name: summary.by_length(run, names, bins) for name, run in runs.items()}
    rows = []
    for index, (low, high) in enumerate(bins):
        marks = [(name, place, figures[name][index]) for place, name in enumerate(figures) if figures[name][index]]
        if marks:
            texts = [number(figures[name][index] and figures[name][index].score) for name in figures]
            rows.append([_bin(low, high), Track(marks), *texts, str(marks[0][2].rows)])
    note = "The mean over all rows of a length, in words (Chinese: characters); data sets mix differently in each."
    return Section("Score by length", [note], [Table(["length", "", *figures, "rows"], rows)])


def _bin(low, high):
    if high >= 1000 and low % 512 == 0:
        return f"{f'{low / 1024:g}k' if low else 0} to {high / 1024:g}k"
    return f"{low} to {high - 1}" if high - low > 1 else str(low)


def _map_sections(runs):
    sections = []
    for name, run in runs.items():
        lengths = [
            row["length"]
            for dataset, scores in run.datasets.items()
            if summary.plain_name(dataset) in summary.RETRIEVAL
            for row in scores.rows
        ]
        if not lengths:
            continue
        bins = summary.length_bins(lengths)
        cells = summary.retrieval_map(run, bins)
        if cells is None:
            continue
        step = 100 // summary.DEPTHS
        rows = [(f"{depth * step} to {depth * step + step} %", row) for depth, row in enumerate(cells)]
        note = "Depth: where in the document what is asked for stands first. Each cell: mean score, and how many rows."
        sections.append(
            Section(f"Retrieval by length and depth: {name}", [note], [HeatMap([_bin(*part) for part in bins], rows)])
        )
    return sections


def _worst_section(kinds, runs):
    run = next(iter(runs.values()))
    blocks = []
    for name in (name for names in kinds.values() for name in names):
        others = {
            other: {row.get("_id"): row["pred"] for row in scores.datasets[name].rows}
            for other, scores in list(runs.items())[1:]
            if name in scores.datasets
        }
        blocks.append(Answers(name, [_answer(row, score, others) for row, score in summary.worst(run.datasets[name])]))
    return Section("The worst answers", ["Up to ten of each data set, the lowest scores first."], blocks)


def _answer(row, score, others):
    from mindformers_glm32k.longbench.score import loops

    marks = ["empty"] * (not row["pred"].strip()) + ["loop"] * loops(row["pred"])
    return Answer(
        round(100 * score, 1),
        row["length"],
        marks,
        _shorten(row.get("input") or "", QUESTION),
        [_shorten(answer, PREDICTION) for answer in row["answers"]],
        _shorten(row["pred"], PREDICTION),
        [(name, _shorten(found[row["_id"]], PREDICTION)) for name, found in others.items() if row.get("_id") in found],
    )


def _made_section(runs):
    """How each run was made, from the stamps of its lines; LongBench's own pred.py writes none."""
    rows = []
    for name, run in runs.items():
        made = {}
        for scores in run.datasets.values():
            for stamp in scores.stamps:
                made.setdefault(_made(stamp), stamp)
        rows += [[name, *texts] for texts in made]
    if not rows:
        return []
    head = ["run", "engine", "model", "prompts up to", "differs from pred.py"]
    return [Section("How the predictions were made", [], [Table(head, rows)])]


def _made(stamp):
    keys = ("engine", "model", "max_length")
    return (*(str(stamp.get(key, "-")) for key in keys), "; ".join(stamp.get("differs", [])) or "-")


def _shorten(text, limit):
    """The beginning and the end of a long text: a question stands at its end."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"

"""Lengths of records by data set: a table and a histogram."""

from __future__ import annotations

import os
from array import array
from typing import Any

import numpy as np

SEQUENCE = 32768  # tokens of the model's longest sequence
_BATCH = 1 << 20  # characters that are tokenized together, in parallel threads


class RecordLengths:
    """Lengths of records, 8 bytes each: in tokens with a Vocabulary, else the `length` that LongBench's records bring
    along (words, in Chinese characters)."""

    def __init__(self, vocabulary: Any = None):
        self._vocabulary = vocabulary
        self._columns = {}  # (data set, side) -> lengths of prompts, lengths of answers
        self._waiting, self._characters = [], 0  # records that are not yet tokenized

    def add(self, side: str, record: dict) -> None:
        """Counts one record of a side, "train" or "heldout": it has dataset, content and summary, and length where
        there is no vocabulary.
        """
        columns = self._columns.setdefault((record["dataset"], side), (array("i"), array("i")))
        if self._vocabulary is None:
            length = record.get("length")
            columns[0].append(length if isinstance(length, int) else 0)
            return
        self._waiting.append((columns, record["content"], record["summary"]))
        self._characters += len(record["content"]) + len(record["summary"])
        if self._characters > _BATCH:
            self._tokenize()

    def _tokenize(self):
        if not self._waiting:
            return
        # records of the same document, one for each answer, have one prompt
        texts = list(dict.fromkeys(text for _, *both in self._waiting for text in both))
        counts = dict(zip(texts, map(len, self._vocabulary.encode_batch(texts))))
        for columns, prompt, answer in self._waiting:
            columns[0].append(counts[prompt])
            columns[1].append(counts[answer])
        self._waiting, self._characters = [], 0

    def records(self, side: str, dataset: str | None = None) -> int:
        """Records of a side, of one data set or in all."""
        self._tokenize()
        return sum(
            len(prompts)
            for (name, of_side), (prompts, _) in self._columns.items()
            if of_side == side and dataset in (name, None)
        )

    def _of(self, dataset, column):
        """Lengths of a data set's (None: all) prompts (column 0) or answers (1), both sides together."""
        self._tokenize()
        return np.array(
            [
                length
                for (name, _), columns in self._columns.items()
                if dataset in (name, None)
                for length in columns[column]
            ],
            np.int64,
        )

    def table(self) -> str:
        """One line for each data set and one for all."""
        tokens = self._vocabulary is not None
        lines = [["data set", "records", "held out", "median", "95 %", "longest"]]
        lines[0] += ["longest answer", f"above {SEQUENCE}"] if tokens else []
        for name in [*sorted({dataset for dataset, _ in self._columns}), None]:
            prompts, answers = self._of(name, 0), self._of(name, 1)
            parts = [int(np.percentile(prompts, part)) for part in (50, 95, 100)]
            line = ["all" if name is None else name, len(prompts), self.records("heldout", name), *parts]
            lines.append(line + ([answers.max(), (prompts + answers > SEQUENCE).sum()] if tokens else []))
        widths = [max(len(str(cell)) for cell in column) for column in zip(*lines)]
        unit = "tokens" if tokens else "words (Chinese: characters) of the document; --tokenizer counts tokens"
        text = [f"Lengths of prompts in {unit}"]
        for first, *others in lines:
            cells = [first.ljust(widths[0])] + [str(cell).rjust(width) for cell, width in zip(others, widths[1:])]
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)

    def draw(self, path: str | os.PathLike) -> None:
        """Draws a histogram of the tokens of prompt and answer together, a PNG file."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        names = sorted({dataset for dataset, _ in self._columns})
        lengths = [self._of(name, 0) + self._of(name, 1) for name in names]
        first = int(np.log2(max(1, min(part.min() for part in lengths))))
        last = int(np.ceil(np.log2(max(SEQUENCE, max(part.max() for part in lengths)) + 1)))
        ticks = [2**power for power in range(first, last + 1)]
        figure = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.hist(
            lengths,
            2.0 ** np.arange(first, last + 0.1, 0.25),
            stacked=True,
            label=names,
            color=matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(names))),
        )
        axes.axvline(SEQUENCE, color="black", linestyle="--", label=f"{SEQUENCE} tokens")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        longer = sum((part > SEQUENCE).sum() for part in lengths)
        title = f"{sum(map(len, lengths))} records, {longer} longer than {SEQUENCE} tokens"
        axes.set(xlabel="tokens of prompt and answer", ylabel="records", title=title)
        figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(path, dpi=120)

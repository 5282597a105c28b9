"""How long rows are, by data set: a table and a picture."""

from array import array

import numpy as np

ROW = 32768  # tokens of the model's longest row
_BATCH = 1 << 20  # characters that are tokenized together, in parallel threads


class RowLengths:
    """Lengths of rows: in tokens with a vocabulary, else the `length` that LongBench's records bring along (words, in
    Chinese characters). Kept are 8 bytes a row.

    Args:
        vocabulary (Vocabulary | None): counts tokens.
    """

    def __init__(self, vocabulary=None):
        self._vocabulary = vocabulary
        self._rows = {}  # (data set, side) -> lengths of prompts, lengths of answers
        self._waiting, self._characters = [], 0  # rows that are not yet tokenized

    def add(self, side, row):
        """Counts one row.

        Args:
            side (str): "train" or "heldout".
            row (dict): has dataset, content and summary, and length where there is no vocabulary.
        """
        columns = self._rows.setdefault((row["dataset"], side), (array("i"), array("i")))
        if self._vocabulary is None:
            length = row.get("length")
            columns[0].append(length if isinstance(length, int) else 0)
            return
        self._waiting.append((columns, row["content"], row["summary"]))
        self._characters += len(row["content"]) + len(row["summary"])
        if self._characters > _BATCH:
            self._tokenize()

    def _tokenize(self):
        if not self._waiting:
            return
        # rows of the same record, one for each answer, have one prompt
        texts = list(dict.fromkeys(text for _, *both in self._waiting for text in both))
        counts = dict(zip(texts, map(len, self._vocabulary.encode_batch(texts))))
        for columns, prompt, answer in self._waiting:
            columns[0].append(counts[prompt])
            columns[1].append(counts[answer])
        self._waiting, self._characters = [], 0

    def rows(self, side):
        """int: rows of a side in all."""
        self._tokenize()
        return sum(len(prompts) for (_, of_side), (prompts, _) in self._rows.items() if of_side == side)

    def _of(self, name, place):
        """np.ndarray: lengths of a data set's prompts (place 0) or answers (1), both sides together."""
        self._tokenize()
        return np.array(
            [
                length
                for (dataset, _), columns in self._rows.items()
                if name in (dataset, None)
                for length in columns[place]
            ],
            np.int64,
        )

    def table(self):
        """str: one line for each data set and one for all."""
        tokens = self._vocabulary is not None
        head = ["data set", "rows", "held out", "median", "95 %", "longest"]
        head += ["longest answer", f"above {ROW}"] if tokens else []
        lines = [head]
        for name in [*sorted({dataset for dataset, _ in self._rows}), None]:
            prompts = self._of(name, 0)
            held_out = sum(
                len(columns[0])
                for (dataset, side), columns in self._rows.items()
                if side == "heldout" and name in (dataset, None)
            )
            line = [
                "all" if name is None else name,
                len(prompts),
                held_out,
                *(int(np.percentile(prompts, part)) for part in (50, 95, 100)),
            ]
            if tokens:
                line += [self._of(name, 1).max(), (prompts + self._of(name, 1) > ROW).sum()]
            lines.append(line)
        widths = [max(len(str(line[column])) for line in lines) for column in range(len(head))]
        unit = "tokens" if tokens else "words (Chinese: characters) of the document; --tokenizer counts tokens"
        return "\n".join(
            [f"Lengths of prompts in {unit}"]
            + [
                "  ".join(
                    str(cell).ljust(width) if not column else str(cell).rjust(width)
                    for column, (cell, width) in enumerate(zip(line, widths))
                ).rstrip()
                for line in lines
            ]
        )

    def draw(self, path):
        """Draws a histogram of the tokens of prompt and answer together.

        Args:
            path (str | os.PathLike): the PNG file.
        """
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        names = sorted({dataset for dataset, _ in self._rows})
        lengths = [self._of(name, 0) + self._of(name, 1) for name in names]
        first = int(np.log2(max(1, min(part.min() for part in lengths))))
        last = int(np.ceil(np.log2(max(ROW, max(part.max() for part in lengths)) + 1)))
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
        axes.axvline(ROW, color="black", linestyle="--", label=f"{ROW} tokens")
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            [2**power for power in range(first, last + 1)], [str(2**power) for power in range(first, last + 1)]
        )
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(
            xlabel="tokens of prompt and answer",
            ylabel="rows",
            title=f"{sum(map(len, lengths))} rows, {sum((part > ROW).sum() for part in lengths)} longer than "
            f"{ROW} tokens",
        )
        figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(path, dpi=120)

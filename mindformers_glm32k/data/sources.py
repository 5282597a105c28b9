"""All samples of a file or a folder, by number."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from mindformers_glm32k.data.chats import ChatLayout, OpenAILayout, ShareGPTLayout
from mindformers_glm32k.data.formats import (
    AdGenLayout,
    Chat,
    LongBenchLayout,
    Sample,
    Text,
    TextLayout,
    carries_text,
    layout_of,
)
from mindformers_glm32k.data.jsonl import RAISE, JsonLines, first_record
from mindformers_glm32k.data.prompts import PromptTemplates
from mindformers_glm32k.data.question_formats import ALPACA, QUERY, QUESTION_LAYOUTS
from mindformers_glm32k.errors import InputError

AUTO = "auto"
LAYOUTS = (
    AUTO,
    AdGenLayout.name,
    LongBenchLayout.name,
    ShareGPTLayout.name,
    OpenAILayout.name,
    ChatLayout.name,
    ALPACA,
    QUERY,
    TextLayout.name,
)
_BEHIND = "messages behind the last answer"
_HOW_TO_GIVE = "Set data_loader.dataset_dir or --train_dataset_dir / --eval_dataset_dir to a file or folder of .jsonl."


class SampleSource:
    """Random access to the samples of one or more files; JsonLines says which lines are checked when it is built.

    Args:
        dataset_dir: a file, or a folder whose *.jsonl are read in the order of their names.
        columns: the two fields of the AdGen layout.
        layout: one of LAYOUTS; "auto" looks at the first record of each file, and takes the first layout in LAYOUTS'
            order whose fields it has.
        prompt_config_file: the templates of the LongBench layout.
        num_samples: read only the first samples, this many.
        cache_dir: where indexes of big files are kept; see `cache_folder`.
        on_error: "raise" or "skip", for damaged lines; see JsonLines.

    Raises:
        InputError: files missing, empty or with lines that are not fit for use, or no templates where needed.
    """

    def __init__(
        self,
        dataset_dir: str | os.PathLike,
        columns: tuple[str, str] = ("content", "summary"),
        layout: str = AUTO,
        prompt_config_file: str | os.PathLike | None = None,
        num_samples: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        on_error: str = RAISE,
    ):
        prompts = PromptTemplates(prompt_config_file) if prompt_config_file else None
        # fields that are a known layout's too have its other fields with them
        named = [one for one in QUESTION_LAYOUTS if one.fields == tuple(columns)]
        candidates = [*named, AdGenLayout(columns), LongBenchLayout(prompts), ShareGPTLayout(), OpenAILayout()]
        candidates += [ChatLayout(), *QUESTION_LAYOUTS, TextLayout()]
        if layout != AUTO:
            candidates = [candidate for candidate in candidates if candidate.name == layout]
        self._files = [_open(path, candidates, cache_dir, on_error) for path in _data_files(dataset_dir)]
        # sample i lies in the first file whose end is beyond i
        self._ends = np.cumsum([len(lines) for lines, _ in self._files])
        self._size = min(int(self._ends[-1]), num_samples or int(self._ends[-1]))

    def __len__(self) -> int:
        return self._size

    def _locate(self, index):
        if not 0 <= index < self._size:
            raise IndexError(f"sample {index} of {self._size}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[file], int(index) - (int(self._ends[file - 1]) if file else 0)

    def __getitem__(self, index: int) -> Sample | Chat | Text:
        (lines, layout), record = self._locate(index)
        return layout.sample(lines[record])

    def location(self, index: int) -> str:
        """File and line of a sample, for messages."""
        (lines, _), record = self._locate(index)
        return f"{lines.path}, line {lines.line(record)}"

    def sizes(self) -> np.ndarray:
        """Bytes of each sample's line, int64 (len(self),)."""
        return np.concatenate([lines.sizes(np.arange(len(lines))) for lines, _ in self._files])[: self._size]

    def files(self) -> list[tuple[str, str, int]]:
        """Path, layout and number of records of each file."""
        return [(str(lines.path), layout.name, len(lines)) for lines, layout in self._files]

    def unused(self) -> list[str]:
        """For each file with fields that carry text and are in no sample: their names, and in how many records."""
        return [
            f"{lines.path}: not used are "
            + ", ".join(f"{field!r} of {count}" for field, count in (+counts).items())
            + f" of {lines.check.records} records; only the fields of the layout {layout.name} are"
            for lines, layout in self._files
            for counts in [lines.check.unused]
            if +counts
        ]

    def longbench_files(self) -> list[tuple[str, str]]:
        """Path and data set of each file with LongBench's samples, in its own layout or as records of `glm32k
        preprocess`, by its first record.
        """
        found = []
        for lines, layout in self._files:
            record = lines[0]
            if layout.name == LongBenchLayout.name or layout.name == AdGenLayout.name and "_id" in record:
                found.append((str(lines.path), record.get("dataset")))
        return found

    def problems(self) -> list[str]:
        """For each file with damaged lines that are skipped: how many of how many, and the first ones."""
        return [
            f"{lines.problems.count} of {lines.problems.count + len(lines)} lines are damaged and skipped: "
            f"{lines.problems.text()}"
            for lines, _ in self._files
            if lines.problems.count
        ]


def _data_files(dataset_dir):
    if not dataset_dir:
        raise InputError(f"data_loader.dataset_dir: no path given. {_HOW_TO_GIVE}")
    path = Path(dataset_dir)
    if not path.is_dir():
        return [path]
    # a hidden file is what an interrupted program left behind
    files = sorted(file for file in path.glob("*.jsonl") if not file.name.startswith("."))
    if not files:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise InputError(f"data_loader.dataset_dir {path}: no *.jsonl in this folder, found {found}. {_HOW_TO_GIVE}")
    return files


def _open(path, candidates, cache_dir, on_error):
    layout = candidates[0]
    if len(candidates) > 1:
        layout = layout_of(first_record(path, lambda record: layout_of(record, candidates), on_error), candidates)
    if isinstance(layout, LongBenchLayout) and layout.prompts is None:
        raise InputError(
            f"{path}: this is LongBench's layout; set data_loader.prompt_config_file to the "
            "dataset2prompt.json that holds the prompts"
        )
    check = _Check(layout)
    lines = JsonLines(path, check=check, cache_dir=cache_dir, on_error=on_error)
    check.counting = False
    return lines, layout


class _Check:
    """Makes a sample of each record, and counts, in the records that are looked at before a run, what is not used."""

    def __init__(self, layout):
        self._layout, self.records, self.unused, self.counting = layout, 0, Counter(), True

    def __call__(self, record):
        sample = self._layout.sample(record)
        if self.counting:
            self.records += 1
            self.unused.update(self._layout.unused(record))
            if isinstance(sample, Chat) and not sample.messages[-1].in_loss:
                self.unused[_BEHIND] += carries_text(sample.messages[-1].content)
        return sample

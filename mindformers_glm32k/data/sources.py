"""All samples of a file or a folder, by index; which files of a folder are data, and which are passed over."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from mindformers_glm32k.data.chats import ChatLayout, OpenAILayout, ShareGPTLayout
from mindformers_glm32k.data.formats import (
    ALPACA,
    QUERY,
    QUESTION_LAYOUTS,
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
from mindformers_glm32k.data.longbench import LOUD, Manifest, PromptTemplates, is_test_set, manifest_path
from mindformers_glm32k.data.records import json_lines
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
_LINES = (".jsonl", ".ndjson", ".jl")  # one record a line
ENDINGS = (*_LINES, ".json", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4")
_HELD_OUT = "heldout"  # folder that `glm32k preprocess` writes held-out records to
_TRAIN, _EVAL = {"train", "training"}, {"dev", "test", "val", "valid", "validation", "eval", "evaluation"}
_OPEN_FILES = 64  # with more files than this, none is kept open
_BEHIND = "messages behind the last answer"
_HOW_TO_GIVE = "Set data_loader.dataset_dir or --train_dataset_dir / --eval_dataset_dir to a file or folder of .jsonl."


class SampleSource:
    """Random access to the samples of one or more files; JsonLines says which lines are checked when it is built.

    Args:
        dataset_dir: a file (records.py has the kinds), or a folder whose data files are read in the order of their
            names, those of sub-folders too.
        columns: the two fields of the AdGen layout.
        layout: one of LAYOUTS; "auto" takes, for each file, the first layout in LAYOUTS' order that its
            first record matches.
        prompt_config_file: the templates of the LongBench layout.
        num_samples: read only this many samples, the first ones.
        cache_dir: where indexes of big files are kept; see `cache_folder`.
        on_error: "raise" or "skip", for damaged lines; see JsonLines.
        for_evaluation: whether, of a folder with files named train… and dev…, the latter are read.

    Attributes:
        passed_over: files of the folder that are not read, each with the reason.

    Raises:
        InputError: files missing, empty or with unusable lines, or no templates where needed.
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
        for_evaluation: bool = False,
    ):
        prompts = PromptTemplates(prompt_config_file) if prompt_config_file else None
        # columns of a known layout, such as Alpaca's, are read with its other fields, such as `input`
        named = [one for one in QUESTION_LAYOUTS if one.fields == tuple(columns)]
        candidates = [*named, AdGenLayout(columns), LongBenchLayout(prompts), ShareGPTLayout(), OpenAILayout()]
        candidates += [ChatLayout(), *QUESTION_LAYOUTS, TextLayout()]
        if layout != AUTO:
            candidates = [candidate for candidate in candidates if candidate.name == layout]
        self.passed_over: list[tuple[Path, str]] = []
        self._files = self._open(dataset_dir, candidates, cache_dir, on_error, for_evaluation)
        # cumulative number of samples: sample i is in the first file with an end above i
        self._ends = np.cumsum([len(lines) for lines, _ in self._files])
        self._size = min(int(self._ends[-1]), num_samples or int(self._ends[-1]))

    def _open(self, dataset_dir, candidates, cache_dir, on_error, for_evaluation):
        if not dataset_dir:
            raise InputError(f"data_loader.dataset_dir: no path given. {_HOW_TO_GIVE}")
        path = Path(dataset_dir)
        if not os.path.isdir(path):  # Path.is_dir raises where the name is too long
            return [_open(path, candidates, cache_dir, on_error)]
        paths, self.passed_over = data_files(path, for_evaluation)
        files = []
        for file in paths:
            try:
                files.append(_open(file, candidates, cache_dir, on_error, keep_open=len(paths) <= _OPEN_FILES))
            except _NoData as error:
                if is_json_lines(file):
                    raise
                self.passed_over.append((file, str(error).replace(f"{file}: ", "")))
        if not files:
            found = "; ".join(f"{file.relative_to(path)}: {why}" for file, why in self.passed_over[:8]) or "nothing"
            raise InputError(
                f"data_loader.dataset_dir {path}: no *.jsonl in this folder, found {found}; .json, .parquet, .arrow "
                f"and .gz with records are read, too. {_HOW_TO_GIVE}"
            )
        return files

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
        return f"{lines.path}, {lines.unit} {lines.line(record)}"

    def sizes(self) -> np.ndarray:
        """Bytes of each sample's line, int64 (len(self),)."""
        return np.concatenate([lines.sizes(np.arange(len(lines))) for lines, _ in self._files])[: self._size]

    def files(self) -> list[tuple[str, str, int]]:
        """Path, layout and number of records of each file."""
        return [(str(lines.path), layout.name, len(lines)) for lines, layout in self._files]

    def left_out(self) -> list[str]:
        """One sentence that names the files of the folder that are not read; empty where all are."""
        named = ", ".join(f"{path} ({reason})" for path, reason in self.passed_over)
        return [f"{len(self.passed_over)} files are passed over: {named}"] if named else []

    def unused(self) -> list[str]:
        """For each file with fields that carry text and are in no sample: their names, and in how many records."""
        around = [
            f"{lines.path}: not used is what stands around the records: {', '.join(map(repr, lines.check.around))}"
            for lines, _ in self._files
            if lines.check.around
        ]
        return around + [
            f"{lines.path}: not used are "
            + ", ".join(f"{field!r} of {count}" for field, count in (+counts).items())
            + f" of {lines.check.records} records; only the fields of the layout {layout.name} are"
            for lines, layout in self._files
            for counts in [lines.check.unused]
            if +counts
        ]

    def longbench_files(self) -> list[tuple[str, str]]:
        """(path, data set) of each file with LongBench's samples, judged by its first record: in LongBench's own layout
        or as `glm32k preprocess` writes them.
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


def contamination_warning(source: SampleSource) -> list[str]:
    """One warning where LongBench's test samples are read for training, from its own files or from records without
    held-out ones; else an empty list.
    """
    names = [
        path
        for path, dataset in source.longbench_files()
        if is_test_set(dataset) and not (manifest_path(path).is_file() and Manifest.read(manifest_path(path)).holdout)
    ]
    if not names:
        return []
    return [
        LOUD + f"Files: {', '.join(names)}. `glm32k preprocess --holdout 0.1` splits them by document and notes "
        "which records were trained on."
    ]


class _NoData(InputError):
    """A file whose first record has no known layout, or that cannot be read at all."""


def _open(path, candidates, cache_dir, on_error, keep_open=True):
    def is_record(record):
        return any(layout.matches(record) for layout in candidates)

    layout, shown, around = candidates[0], None, []
    try:
        lines_file = json_lines(path, is_record, cache_dir, around.extend)
        if lines_file is not None:
            shown, cache_dir = Path(path), lines_file.parent
        file = lines_file or path
        if len(candidates) > 1:
            first = first_record(file, lambda record: layout_of(record, candidates), on_error, shown)
            layout = layout_of(first, candidates)
    except InputError as error:
        raise _NoData(str(error)) from error
    if isinstance(layout, LongBenchLayout) and layout.prompts is None:
        raise InputError(
            f"{path}: this is LongBench's layout; set data_loader.prompt_config_file to the "
            "dataset2prompt.json that holds the prompts"
        )
    check = _Check(layout, around)
    lines = JsonLines(file, check, cache_dir, on_error, shown, keep_open)
    check.counting = False
    return lines, layout


class _Check:
    """Turns each record into a sample; counts the unused fields of the records that are checked before a run."""

    def __init__(self, layout, around=()):
        self._layout, self.records, self.unused, self.counting = layout, 0, Counter(), True
        self.around = around  # fields with text in the object around the records

    def __call__(self, record):
        sample = self._layout.sample(record)
        if self.counting:
            self.records += 1
            self.unused.update(self._layout.unused(record))
            if isinstance(sample, Chat) and not sample.messages[-1].in_loss:
                self.unused[_BEHIND] += carries_text(sample.messages[-1].content)
        return sample


def data_files(folder: Path, for_evaluation: bool = False) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The data files below a folder in the order of their names, and (path, reason) of those passed over.

    Hidden files (left by interrupted programs) and hidden folders (caches) are ignored. Links to folders are followed,
    each folder is read once. Where files or sub-folders named train… and dev…, test… or valid… are side by side, only
    those for the purpose are taken.

    Raises:
        InputError: a folder that cannot be listed.
    """
    found, passed_over, seen = [], [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        parent = Path(parent)
        visible = sorted(name for name in (*names, *folders) if not name.startswith("."))
        inside = {name for name in folders if not name.startswith(".")}
        reasons = {name: "no data by its name" for name in visible if not _plain(name).endswith(ENDINGS)}
        reasons = {name: reason for name, reason in reasons.items() if name not in inside}
        reasons.update({name: "held out from training" for name in inside if name == _HELD_OUT})
        reasons.update(_packed_twins(set(visible) - inside - reasons.keys()))
        splits = {name: _split(name) for name in visible if name not in reasons}
        if {True, False} <= set(splits.values()):
            reason = f"for {'training' if for_evaluation else 'evaluation'}, by its name"
            reasons.update({name: reason for name, split in splits.items() if split is (not for_evaluation)})
        for name in sorted(inside - reasons.keys()):
            real = os.path.realpath(parent / name)
            if real in seen:
                reasons[name] = "a link to a folder that is read already"
            seen.add(real)
        folders[:] = sorted(inside - reasons.keys())
        found += [parent / name for name in visible if name not in inside and name not in reasons]
        passed_over += [(parent / name, reasons[name]) for name in visible if name in reasons]
    return sorted(found), passed_over


def _packed_twins(names):
    """Compressed files with their uncompressed file beside them, and why they are passed over."""
    return {
        name: f"compressed, and {name[: -len(ending)]} lies beside it"
        for name in names
        for ending in PACKED
        if name.lower().endswith(ending) and name[: -len(ending)] in names
    }


def _unreadable(error):
    raise InputError(
        f"{error.filename}: cannot be listed ({error.strerror}); mend that, or move it elsewhere"
    ) from error


def is_json_lines(path: Path) -> bool:
    """Whether a file's name promises one record a line, and nothing but records."""
    return _plain(path.name).endswith(_LINES)


def _plain(name):
    """The name in lower case, without the suffix of a compressed file."""
    name = name.lower()
    return next((name[: -len(ending)] for ending in PACKED if name.endswith(ending)), name)


def _split(name):
    """By the file's name: True for evaluation, False for training, None where it does not say."""
    words = re.findall(r"[a-z]+", re.sub(r"(\.[a-z0-9]+)+$", "", name.lower()))
    for word in words[:1] + words[-1:]:  # test.jsonl, news_test.jsonl
        if word in _EVAL or word in _TRAIN:
            return word in _EVAL
    return None

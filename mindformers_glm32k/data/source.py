"""All samples of a file or a folder, by number."""
from pathlib import Path

import numpy as np

from mindformers_glm32k.data.jsonl import JsonLines, first_record
from mindformers_glm32k.data.layouts import AdGenLayout, LongBenchLayout, layout_of
from mindformers_glm32k.data.prompts import PromptTemplates
from mindformers_glm32k.errors import InputError

AUTO = "auto"
LAYOUTS = (AUTO, AdGenLayout.name, LongBenchLayout.name)
_HOW_TO_GIVE = "Set data_loader.dataset_dir or --train_dataset_dir / --eval_dataset_dir to a file or folder of .jsonl."


class SampleSource:
    """Random access to the samples of one or more files; JsonLines says which lines are checked when it is built.

    Args:
        dataset_dir (str | os.PathLike): a file, or a folder whose *.jsonl are read in the order of their names.
        columns (tuple[str, str]): the two fields of the AdGen layout.
        layout (str): one of LAYOUTS; "auto" looks at the first record of each file, and takes a record that has
            both layouts' fields for AdGen's, which needs no template.
        prompt_config_file (str | os.PathLike | None): the templates of the LongBench layout.
        num_samples (int | None): read only the first samples, this many.
        cache_dir (str | os.PathLike | None): where indexes of big files are kept; see `cache_folder`.

    Raises:
        InputError: files missing, empty or with lines that are not fit for use, or no templates where needed.
    """

    def __init__(self, dataset_dir, columns=("content", "summary"), layout=AUTO, prompt_config_file=None,
                 num_samples=None, cache_dir=None):
        prompts = PromptTemplates(prompt_config_file) if prompt_config_file else None
        candidates = [AdGenLayout(columns), LongBenchLayout(prompts)]
        if layout != AUTO:
            candidates = [candidate for candidate in candidates if candidate.name == layout]
        self._files = [_open(path, candidates, cache_dir) for path in _data_files(dataset_dir)]
        # sample i lies in the first file whose end is beyond i
        self._ends = np.cumsum([len(lines) for lines, _ in self._files])
        self._size = min(int(self._ends[-1]), num_samples or int(self._ends[-1]))

    def __len__(self):
        return self._size

    def _locate(self, index):
        if not 0 <= index < self._size:
            raise IndexError(f"sample {index} of {self._size}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[file], int(index) - (int(self._ends[file - 1]) if file else 0)

    def __getitem__(self, index):
        """Sample number `index`, 0 <= index < len(self)."""
        (lines, layout), record = self._locate(index)
        return layout.sample(lines[record])

    def place(self, index):
        """str: file and line of sample `index`, for messages."""
        (lines, _), record = self._locate(index)
        return f"{lines.path}, line {lines.line(record)}"

    def sizes(self):
        """np.ndarray: int64 (len(self),), bytes of each sample's line."""
        return np.concatenate([lines.sizes(np.arange(len(lines))) for lines, _ in self._files])[:self._size]

    def files(self):
        """list[tuple[str, str, int]]: path, layout and number of records of each file."""
        return [(str(lines.path), layout.name, len(lines)) for lines, layout in self._files]


def _data_files(dataset_dir):
    if not dataset_dir:
        raise InputError(f"data_loader.dataset_dir: no path given. {_HOW_TO_GIVE}")
    path = Path(dataset_dir)
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise InputError(f"data_loader.dataset_dir {path}: no *.jsonl in this folder, found {found}. {_HOW_TO_GIVE}")
    return files


def _open(path, candidates, cache_dir):
    record = first_record(path)
    if len(candidates) == 1:
        layout = candidates[0]
    else:
        try:
            layout = layout_of(record, candidates)
        except InputError as error:
            raise InputError(f"{path}: line 1: {error}") from error
    if isinstance(layout, LongBenchLayout) and layout.prompts is None:
        raise InputError(f"{path}: this is LongBench's layout; set data_loader.prompt_config_file to the "
                         "dataset2prompt.json that holds the prompts")
    return JsonLines(path, check=layout.sample, cache_dir=cache_dir), layout

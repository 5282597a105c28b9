"""GLM32KDataLoader: the `data_loader` section of the YAML; and the order of the samples, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mindspore.dataset import GeneratorDataset, Sampler

from mindformers_glm32k.checks import boolean, choice, reject_unknown, whole_number, workers
from mindformers_glm32k.data.jsonl import ON_ERROR, RAISE
from mindformers_glm32k.data.sources import AUTO, LAYOUTS, SampleSource, contamination_warning
from mindformers_glm32k.errors import InputError

# column name -> its value for sample `index`
COLUMNS = {
    "prompt": lambda source, index: np.array(source[index].prompt),
    "answer": lambda source, index: np.array(source[index].answer),
    "sample": lambda source, index: np.array(index, np.int64),
}
_KEYS = (
    "type dataset_dir shuffle origin_columns layout prompt_config_file num_samples num_shards shard_id seed "
    "column_names phase version num_parallel_workers python_multiprocessing on_error cache_dir"
).split()
WINDOW = 50  # batches within which samples are sorted by size
_TEXTS = {"prompt", "answer"}  # columns of layouts with one question and its answer


class GLM32KDataLoader:
    """The samples of data files, as a MindSpore dataset.

    Calling it returns a `GeneratorDataset`, as MindFormers' own loaders do; `samples_of` returns the `SampleSource`
    behind it, which maps indices to samples.

    Args:
        dataset_dir: a file, or a folder whose data files are read in the order of their names.
        shuffle: a new order in each epoch. Default False.
        origin_columns: the fields of AdGen lines. Default ["content", "summary"].
        layout: one of sources.LAYOUTS; "auto" (default): by the fields of each file's first record.
        prompt_config_file: LongBench's dataset2prompt.json; needed for its layout.
        num_samples: read only this many samples, the first ones, >= 1.
        num_shards: number of ranks that share the samples, >= 1. Default: not shared.
        shard_id: this rank, 0 <= shard_id < num_shards.
        seed: determines the shuffled orders, >= 0. Default 0.
        column_names: any of "prompt", "answer" (texts, the default) and "sample" (the index);
            chats and plain text have the index only.
        phase: "train" or "eval", as in MindFormers' YAMLs; decides which files of a folder are read (sources.py).
            Without it, shuffled data counts as training data, in which LongBench's test sets cause a warning.
        version: MindFormers' choice of a record format; accepted without effect, there is only one format.
        num_parallel_workers: threads or processes that read, >= 1, at most the number of cores. Default 1.
        python_multiprocessing: processes instead of threads. Default False.
        on_error: "raise" (default) or "skip" for damaged lines (bad UTF-8, broken JSON, missing fields, wrong
            types, more than 64 MB). Both report them with file and line; "skip" reads all lines once before the first
            batch.
        cache_dir: where the index of a big file's lines is kept; by default `.glm32k_cache` beside it,
            or in the output folder where that is not writable.

    Raises:
        InputError: unknown keys, wrong values, files missing or empty, unusable lines.
    """

    def __new__(
        cls,
        dataset_dir: str | None = None,
        shuffle: bool = False,
        origin_columns: Sequence[str] = ("content", "summary"),
        layout: str = AUTO,
        prompt_config_file: str | None = None,
        num_samples: int | None = None,
        num_shards: int | None = None,
        shard_id: int | None = None,
        seed: int = 0,
        column_names: Sequence[str] = ("prompt", "answer"),
        phase: str | None = None,
        version: int | None = None,
        num_parallel_workers: int = 1,
        python_multiprocessing: bool = False,
        on_error: str = RAISE,
        cache_dir: str | None = None,
        **unknown: Any,
    ) -> GeneratorDataset:
        from mindformers.tools.logger import logger

        reject_unknown(unknown, _KEYS, "data_loader")
        boolean(shuffle, "data_loader.shuffle")
        boolean(python_multiprocessing, "data_loader.python_multiprocessing")
        choice(layout, "data_loader.layout", LAYOUTS)
        choice(phase, "data_loader.phase", (None, "train", "eval"))
        choice(on_error, "data_loader.on_error", ON_ERROR)
        if not _names(origin_columns) or len(origin_columns) != 2:
            raise InputError(
                f"data_loader.origin_columns: {origin_columns!r} is not a list of two names, "
                "that of the question's field and that of the answer's"
            )
        if not _names(column_names) or not set(column_names) <= set(COLUMNS):
            raise InputError(
                f"data_loader.column_names: {column_names!r} is not a list of names out of {', '.join(COLUMNS)}"
            )
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("num_shards", num_shards, 1),
            ("shard_id", shard_id, 0),
            ("seed", seed, 0),
        ):
            if value is not None:
                whole_number(value, f"data_loader.{name}", least)
        num_shards, shard_id = num_shards or 1, shard_id or 0
        if shard_id >= num_shards:
            raise InputError(f"data_loader.shard_id: {shard_id} is not below num_shards={num_shards}")

        source = SampleSource(
            dataset_dir,
            tuple(origin_columns),
            layout,
            prompt_config_file,
            num_samples,
            cache_dir,
            on_error,
            phase == "eval",
        )
        for path, file_layout, size in source.files():
            logger.info("%s: %d records, layout %s", path, size, file_layout)
            if file_layout not in ("adgen", "longbench") and _TEXTS & set(column_names):
                raise InputError(
                    f"{path}: lines of the layout {file_layout} have no columns prompt and answer; "
                    "set train_dataset_task.type to GLM32KDataset"
                )
        for_training = phase == "train" or phase is None and shuffle
        for problem in (
            source.problems()
            + source.left_out()
            + source.unused()
            + (contamination_warning(source) if for_training else [])
        ):
            logger.warning("%s", problem)
        if len(source) < num_shards:
            raise InputError(
                f"data_loader.dataset_dir {dataset_dir}: {len(source)} records are not enough for "
                f"{num_shards} ranks; give more records or use fewer ranks"
            )
        if len(source) % num_shards and phase != "eval":
            logger.info(
                "%d of %d records are left out in each epoch, so that %d ranks have equally many",
                len(source) % num_shards,
                len(source),
                num_shards,
            )
        return GeneratorDataset(
            _Columns(source, tuple(column_names)),
            list(column_names),
            sampler=EpochSampler(len(source), shuffle, seed or 0, num_shards, shard_id),
            num_parallel_workers=workers(num_parallel_workers or 1, "data_loader.num_parallel_workers"),
            python_multiprocessing=python_multiprocessing,
        )


def samples_of(dataset: Any) -> SampleSource | None:
    """The SampleSource of a dataset that GLM32KDataLoader made; None for any other."""
    columns = getattr(dataset, "source", None)
    return columns.samples if isinstance(columns, _Columns) else None


class _Columns:
    """The source of the GeneratorDataset: the chosen columns of each sample."""

    def __init__(self, samples, names):
        self.samples, self._names = samples, names

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return tuple(COLUMNS[name](self.samples, int(index)) for name in self._names)


def _names(value):
    return isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value)


class EpochSampler(Sampler):
    """Sample indices of one rank, epoch by epoch.

    Each epoch has one order of all samples; rank r of n takes positions r, r + n, r + 2n, … of it. The global batch of
    n ranks with b samples each is therefore the batch of one process with n * b. The remainder modulo n is left out
    (when shuffled, other samples in each epoch), so that all ranks make equally many steps. MindSpore asks for the
    order of every epoch, skipped ones included, so a resumed run continues where it stopped. The order does not depend
    on the number of processes or workers.

    MindSpore's own samplers do not qualify: their shuffled order differs with and without shards, and num_samples with
    shuffle draws with replacement.

    Args:
        size: number of samples.
        shuffle: a new order in each epoch, or the files' order.
        seed: determines the order, together with the epoch's number.
        num_shards: number of ranks that share the samples.
        shard_id: this rank, 0 <= shard_id < num_shards.
    """

    def __init__(self, size: int, shuffle: bool, seed: int = 0, num_shards: int = 1, shard_id: int = 0):
        self._size, self._shuffle, self._seed = size, shuffle, seed
        self._num_shards, self._shard_id = num_shards, shard_id
        self._used = size // num_shards * num_shards
        self._sizes, self._batch = None, 1
        self._epoch = 0
        super().__init__(num_samples=size // num_shards)

    def sort_by(self, sizes: np.ndarray, batch: int) -> None:
        """Puts samples of about the same size (in any unit) into one batch; `batch`: samples of all ranks together."""
        self._sizes, self._batch = sizes, batch

    def keep_all(self) -> None:
        """Keeps the remainder: some ranks get one sample more. For evaluation, where no rank waits for another."""
        self._used = self._size
        self.num_samples = len(range(self._shard_id, self._size, self._num_shards))

    def order(self) -> dict:
        """shuffle, seed, num_shards and shard_id, as another sampler takes them."""
        return {
            "shuffle": self._shuffle,
            "seed": self._seed,
            "num_shards": self._num_shards,
            "shard_id": self._shard_id,
        }

    def __iter__(self) -> Iterator[int]:
        order = sample_order(self._size, self._shuffle, self._seed, self._epoch)
        if self._sizes is not None:
            order = _alike_together(order, self._sizes, self._batch, (self._seed, self._epoch), self._shuffle)
        self._epoch += 1
        return iter(order[self._shard_id : self._used : self._num_shards].tolist())


class StreamSampler(Sampler):
    """Indices of an endless stream, epoch by epoch: 0 … n - 1, then n … 2 n - 1, with n sequences per epoch and
    rank."""

    def __init__(self, sequences_per_epoch: int):
        self._sequences, self._epoch = sequences_per_epoch, 0
        super().__init__(num_samples=sequences_per_epoch)

    def __iter__(self) -> Iterator[int]:
        start, self._epoch = self._epoch * self._sequences, self._epoch + 1
        return iter(range(start, start + self._sequences))


def sample_order(size: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The order of all samples in one epoch, int64 (size,)."""
    return np.random.default_rng((seed, epoch)).permutation(size) if shuffle else np.arange(size)


def _alike_together(order, sizes, batch, seed, shuffle):
    """Sorts by size within windows of WINDOW batches and, where shuffled, puts the batches in a random order again."""
    window = WINDOW * batch
    order = np.concatenate(
        [
            part[np.argsort(sizes[part], kind="stable")]
            for part in (order[at : at + window] for at in range(0, len(order), window))
        ]
    )
    if not shuffle:
        return order
    whole = len(order) // batch
    batches = order[: whole * batch].reshape(whole, batch)
    return np.concatenate(
        (batches[np.random.default_rng((*seed, 1)).permutation(whole)].reshape(-1), order[whole * batch :])
    )

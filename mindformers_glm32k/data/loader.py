"""GLM32KDataLoader: the `data_loader` section of the YAML."""

import numpy as np
from mindspore.dataset import GeneratorDataset, Sampler

from mindformers_glm32k.checks import boolean, choice, reject_unknown, whole_number, workers
from mindformers_glm32k.data.holdout import contamination_warning
from mindformers_glm32k.data.jsonl import ON_ERROR, RAISE
from mindformers_glm32k.data.sources import AUTO, LAYOUTS, SampleSource
from mindformers_glm32k.errors import InputError

# column name -> what it holds of sample number `index`
COLUMNS = {
    "prompt": lambda source, index: np.array(source[index].prompt),
    "answer": lambda source, index: np.array(source[index].answer),
    "sample": lambda source, index: np.array(index, np.int64),
}
_KEYS = (
    "type",
    "dataset_dir",
    "shuffle",
    "origin_columns",
    "layout",
    "prompt_config_file",
    "num_samples",
    "num_shards",
    "shard_id",
    "seed",
    "column_names",
    "phase",
    "version",
    "num_parallel_workers",
    "python_multiprocessing",
    "on_error",
    "cache_dir",
)
_TEXTS = {"prompt", "answer"}  # columns that only a single question has


class GLM32KDataLoader:
    """Questions with answers from JSON lines, as a MindSpore dataset.

    Calling it returns a `GeneratorDataset`, as MindFormers' own loaders do; `samples_of` returns the `SampleSource`
    behind it, which maps sample numbers to samples.

    Args:
        dataset_dir (str): a file, or a folder whose *.jsonl are read in the order of their names.
        shuffle (bool): a new order in each epoch. Default False.
        origin_columns (list[str]): the fields of AdGen lines. Default ["content", "summary"].
        layout (str): "adgen", "longbench", "chat", "text", or "auto" (default): by the first record of each file.
        prompt_config_file (str | None): LongBench's dataset2prompt.json; needed for its layout.
        num_samples (int | None): read only the first samples, this many, >= 1.
        num_shards (int | None): number of ranks that share the samples, >= 1. Default: not shared.
        shard_id (int | None): this rank, 0 <= shard_id < num_shards.
        seed (int): determines the shuffled orders, >= 0. Default 0.
        column_names (list[str]): any of "prompt", "answer" (texts, the default) and "sample" (the number);
            chats and plain text have the number only.
        phase (str | None): "train" or "eval", as MindFormers' YAMLs say it; both are read alike. Without it, what is
            shuffled is for training, and LongBench's test sets in it are warned of.
        version (int | None): MindFormers' choice of a row format; taken and not used, there is one format.
        num_parallel_workers (int): threads or processes that read, >= 1, at most the number of cores. Default 1.
        python_multiprocessing (bool): processes instead of threads. Default False.
        on_error (str): damaged lines (bad UTF-8, broken JSON, missing fields, wrong types, more than 64 MB) are
            fatal, "raise" (default), or left out, "skip". They are reported with file and line either way; to skip
            them, all lines are read once before the first batch.
        cache_dir (str | None): where the index of a big file's lines is kept; by default `.glm32k_cache` beside it,
            or in the output folder where that cannot be written.

    Raises:
        InputError: unknown keys, wrong values, files missing or empty, lines not fit for use.
    """

    def __new__(
        cls,
        dataset_dir=None,
        shuffle=False,
        origin_columns=("content", "summary"),
        layout=AUTO,
        prompt_config_file=None,
        num_samples=None,
        num_shards=None,
        shard_id=None,
        seed=0,
        column_names=("prompt", "answer"),
        phase=None,
        version=None,
        num_parallel_workers=1,
        python_multiprocessing=False,
        on_error=RAISE,
        cache_dir=None,
        **unknown,
    ):
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
            dataset_dir, tuple(origin_columns), layout, prompt_config_file, num_samples, cache_dir, on_error
        )
        for path, file_layout, size in source.files():
            logger.info("%s: %d rows, layout %s", path, size, file_layout)
            if file_layout in ("chat", "text") and _TEXTS & set(column_names):
                raise InputError(
                    f"{path}: lines of the layout {file_layout} have no columns prompt and answer; "
                    "set train_dataset_task.type to GLM32KDataset"
                )
        for_training = phase == "train" or phase is None and shuffle
        for problem in source.problems() + (contamination_warning(source) if for_training else []):
            logger.warning("%s", problem)
        if len(source) < num_shards:
            raise InputError(
                f"data_loader.dataset_dir {dataset_dir}: {len(source)} rows are not enough for "
                f"{num_shards} ranks; give more rows or use fewer ranks"
            )
        if len(source) % num_shards:
            logger.info(
                "%d of %d rows are left out in each epoch, so that %d ranks have equally many",
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


def samples_of(dataset):
    """The SampleSource of a dataset that GLM32KDataLoader made; None for any other."""
    columns = getattr(dataset, "source", None)
    return columns.samples if isinstance(columns, _Columns) else None


class _Columns:
    """What GeneratorDataset draws from: the chosen columns of one sample."""

    def __init__(self, samples, names):
        self.samples, self._names = samples, names

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return tuple(COLUMNS[name](self.samples, int(index)) for name in self._names)


def _names(value):
    return isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value)


WINDOW = 50  # batches within which samples are sorted by size


class EpochSampler(Sampler):
    """Sample numbers of one rank, epoch by epoch.

    Each epoch has one order of all samples; rank r of n takes its places r, r + n, r + 2n, … The global batch of n
    ranks with b rows each is therefore the batch of one process with n * b rows. What does not divide by n is left
    out (when shuffled, other samples in each epoch), so that all ranks make equally many steps. MindSpore asks for
    every epoch's order, skipped ones included, so a resumed run continues where it stopped.

    MindSpore's own samplers do not do: the shuffled order with shards differs from the one without, and
    num_samples with shuffle draws with replacement.

    Args:
        size (int): number of samples.
        shuffle (bool): a new order in each epoch, or the files' order.
        seed (int): with the epoch's number it determines the order.
        num_shards (int): number of ranks that share the samples.
        shard_id (int): this rank, 0 <= shard_id < num_shards.
    """

    def __init__(self, size, shuffle, seed=0, num_shards=1, shard_id=0):
        self._size, self._shuffle, self._seed = size, shuffle, seed
        self._num_shards, self._shard_id = num_shards, shard_id
        self._sizes, self._batch = None, 1
        self._epoch = 0
        super().__init__(num_samples=size // num_shards)

    def sort_by(self, sizes, batch):
        """Lets samples of about the same size come together.

        Args:
            sizes (np.ndarray): (size,), sizes of the samples in any unit.
            batch (int): samples of a batch, those of all ranks counted.
        """
        self._sizes, self._batch = sizes, batch

    def order(self):
        """dict: shuffle, seed, num_shards and shard_id, as another sampler takes them."""
        return {
            "shuffle": self._shuffle,
            "seed": self._seed,
            "num_shards": self._num_shards,
            "shard_id": self._shard_id,
        }

    def __iter__(self):
        order = sample_order(self._size, self._shuffle, self._seed, self._epoch)
        if self._sizes is not None:
            order = _alike_together(order, self._sizes, self._batch, (self._seed, self._epoch), self._shuffle)
        self._epoch += 1
        used = self._size // self._num_shards * self._num_shards
        return iter(order[self._shard_id : used : self._num_shards].tolist())


class StreamSampler(Sampler):
    """Places in an endless stream, epoch by epoch: 0 … n - 1, then n … 2 n - 1, and so on.

    Args:
        rows_per_epoch (int): n, for one rank.
    """

    def __init__(self, rows_per_epoch):
        self._rows, self._epoch = rows_per_epoch, 0
        super().__init__(num_samples=rows_per_epoch)

    def __iter__(self):
        start, self._epoch = self._epoch * self._rows, self._epoch + 1
        return iter(range(start, start + self._rows))


def sample_order(size, shuffle, seed, epoch):
    """np.ndarray: int64 (size,), the order of all samples in one epoch."""
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

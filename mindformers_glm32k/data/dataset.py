"""GLM32KDataset: the `train_dataset_task` and `eval_dataset_task` of the YAML."""
import copy

import numpy as np
from mindformers.dataset.base_dataset import BaseDataset
from mindformers.dataset.dataloader import build_dataset_loader
from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig

from mindformers_glm32k.data.cuts import CutCounter
from mindformers_glm32k.data.loader import samples_of
from mindformers_glm32k.data.options import boolean, choice, reject_unknown, whole_number, workers
from mindformers_glm32k.data.rows import ON_LONG_ANSWER, RAISE, RowBuilder
from mindformers_glm32k.data.truncation import TRUNCATIONS
from mindformers_glm32k.errors import InputError

OUTPUT_COLUMNS = ["input_ids", "labels"]
# Read here, with the value that stands for a missing key (None: needed, or nothing).
DEFAULTS = {
    "data_loader": None, "tokenizer": None, "input_columns": OUTPUT_COLUMNS, "max_source_length": None,
    "max_target_length": None, "seq_length": None, "truncation": "middle", "on_long_answer": RAISE,
    "ignore_pad_token_for_loss": True, "batch_size": 8, "repeat": 1, "drop_remainder": True,
    "num_parallel_workers": 1, "python_multiprocessing": False, "seed": 0, "prefetch_size": 1, "numa_enable": False,
}
# What MindFormers' trainer writes into the section or reads from it; nothing for this class to do.
_HOST_KEYS = ("do_eval", "auto_tune", "filepath_prefix", "autotune_per_step", "profile", "micro_batch_num",
              "output_columns", "construct_args_key", "mixup_op")
KNOWN_KEYS = frozenset(DEFAULTS) | frozenset(_HOST_KEYS)


class GLM32KDataset(BaseDataset):
    """Batches of `input_ids` and `labels` for training and evaluation; `rows.py` shows what a row holds.

    Calling it returns a MindSpore dataset, as MindFormers' own dataset classes do, with int32 columns input_ids and
    labels of shape (batch_size, row length). In data-parallel mode each rank has its share of the rows; where
    MindFormers feeds the whole global batch to each device (semi-auto parallel with full_batch), each has all.

    Args:
        dataset_config (dict): the `train_dataset` or `eval_dataset` section, with the keys

            - data_loader: a section with `type: GLM32KDataLoader`, or what that class returns.
            - tokenizer: a section with `type` and `vocab_file`, or a tokenizer.
            - max_source_length (int): tokens of the prompt, chat format included.
            - max_target_length (int): tokens of the answer without its end token, >= 1; a longer one is kept whole
              where the prompt can make room for it.
            - seq_length (int | None): row length, >= max_source_length + max_target_length + 1, which is the default.
            - truncation (str): how too long prompts are cut: "middle" (default), "left", "right", "longbench" or
              "drop"; see truncation.py.
            - on_long_answer (str): "raise" (default) or "drop", where answers alone do not fit a row.
            - input_columns (list[str]): ["input_ids", "labels"].
            - batch_size (int), repeat (int), prefetch_size (int): >= 1.
            - num_parallel_workers (int): >= 1; no more than the machine has cores are used.
            - drop_remainder (bool), python_multiprocessing (bool), numa_enable (bool).
            - seed (int): >= 0; the data_loader's own `seed` goes first.
            - ignore_pad_token_for_loss (bool): True; padding never has a part in the loss.
        **kwargs: the same keys, when there is no dataset_config.

    Raises:
        InputError: unknown keys, wrong values, files that are missing or unfit, fewer rows than one batch.
    """

    def __new__(cls, dataset_config=None, **kwargs):
        config = _checked(dataset_config or kwargs)
        cls.init_dataset_config(config)
        shard_id, num_shards = cls._generate_shard_info()
        loader = _loader(config, shard_id, num_shards)
        rows = loader.get_dataset_size()
        if config.drop_remainder and rows < config.batch_size:
            raise InputError(f"{rows} rows make no batch of batch_size={config.batch_size}; give more rows, "
                             "a smaller batch_size, or set drop_remainder: False")
        tokenizer = config.tokenizer
        if isinstance(tokenizer, dict):
            tokenizer = build_tokenizer(copy.deepcopy(tokenizer))
        samples = samples_of(loader)
        builder = RowBuilder(tokenizer, config.max_source_length, config.max_target_length, row_length(config),
                             config.truncation, config.on_long_answer)
        cuts = CutCounter(samples.place, rows, logger, config.truncation)
        dataset = loader.map(_Map(samples, builder, cuts), input_columns=["sample"], output_columns=OUTPUT_COLUMNS,
                             num_parallel_workers=config.num_parallel_workers,
                             python_multiprocessing=config.python_multiprocessing)
        dataset = dataset.project(OUTPUT_COLUMNS)
        dataset = dataset.batch(config.batch_size, drop_remainder=config.drop_remainder)
        return dataset.repeat(config.repeat)


def row_length(dataset_config):
    """Tokens of a row: `seq_length` where it is given, else max_source_length + max_target_length + 1 (end token).

    Args:
        dataset_config (dict): the `train_dataset` or `eval_dataset` section.

    Returns:
        int

    Raises:
        InputError: lengths missing or no whole numbers, or seq_length smaller than source + target + 1.
    """
    source = whole_number(dataset_config.get("max_source_length"), "max_source_length", 1)
    target = whole_number(dataset_config.get("max_target_length"), "max_target_length", 1)
    needed, given = source + target + 1, dataset_config.get("seq_length")
    if given is None:
        return needed
    if whole_number(given, "seq_length", 1) < needed:
        raise InputError(f"seq_length={given} is smaller than max_source_length={source} + max_target_length={target} "
                         f"+ 1 for the end token = {needed}; raise it or lower the lengths")
    return given


def check_vocabulary(tokenizer, padded_vocab_size):
    """Raises InputError when the tokenizer has ids that the model's embedding does not have.

    Args:
        tokenizer: has vocab_size, special tokens included.
        padded_vocab_size (int): rows of the model's embedding.
    """
    if tokenizer.vocab_size > padded_vocab_size:
        raise InputError(f"the vocabulary {getattr(tokenizer, 'vocab_file', '') or ''} has {tokenizer.vocab_size} ids, "
                         f"special tokens included, and model_config.padded_vocab_size={padded_vocab_size} has room "
                         "for fewer; set padded_vocab_size to at least that, or take the model's own tokenizer.model")


def _checked(dataset_config):
    """A copy of the section with defaults filled in; InputError names what is wrong with it."""
    reject_unknown(dataset_config, KNOWN_KEYS, "dataset_config")
    given = {key: value for key, value in dataset_config.items() if value is not None}
    config = MindFormerConfig()
    config.update({**DEFAULTS, **given})
    row_length(config)
    for name in ("batch_size", "repeat", "prefetch_size"):
        whole_number(config[name], name, 1)
    config.num_parallel_workers = workers(config.num_parallel_workers, "num_parallel_workers")
    whole_number(config.seed, "seed", 0)
    for name in ("drop_remainder", "python_multiprocessing", "numa_enable"):
        boolean(config[name], name)
    choice(config.truncation, "truncation", tuple(TRUNCATIONS))
    choice(config.on_long_answer, "on_long_answer", ON_LONG_ANSWER)
    if list(config.input_columns) != OUTPUT_COLUMNS:
        raise InputError(f"input_columns: {config.input_columns!r} is not {OUTPUT_COLUMNS}, the columns there are")
    if config.ignore_pad_token_for_loss is not True:
        raise InputError(f"ignore_pad_token_for_loss: {config.ignore_pad_token_for_loss!r} is not True; "
                         "padding is never trained on, remove the key")
    for name in ("data_loader", "tokenizer"):
        if config[name] is None:
            raise InputError(f"{name}: missing; give a section with its type")
    return config


def _loader(config, shard_id, num_shards):
    """The dataset of sample numbers that this rank draws from."""
    loader = config.data_loader
    if isinstance(loader, dict):
        loader = MindFormerConfig(**copy.deepcopy(dict(loader)))
        loader.update(num_shards=num_shards, shard_id=shard_id, column_names=["sample"])
        if loader.get("seed") is None:
            loader.seed = config.seed
        loader = build_dataset_loader(loader)
    if samples_of(loader) is None or loader.column_names != ["sample"]:
        raise InputError("data_loader: a section with type GLM32KDataLoader is needed, or what that class returns "
                         'with column_names=["sample"]')
    return loader


class _Map:
    """Sample number -> input_ids, labels; a class, so that worker processes can be given it."""

    def __init__(self, samples, builder, cuts):
        self._samples, self._builder, self._cuts = samples, builder, cuts

    def __call__(self, sample):
        sample = int(np.asarray(sample).item())
        try:
            row = self._builder(self._samples[sample])
        except InputError as error:
            raise InputError(f"{self._samples.place(sample)}: {error}") from error
        self._cuts.add(sample, row.tokens_before, row.tokens_after)
        return row.input_ids, row.labels

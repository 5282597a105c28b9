"""GLM32KDataset: the `train_dataset_task` and `eval_dataset_task` of the YAML."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from mindformers.dataset.base_dataset import BaseDataset
from mindformers.dataset.dataloader import build_dataset_loader
from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from mindspore.dataset import Dataset

from mindformers_glm32k.checks import boolean, choice, reject_unknown, whole_number, workers
from mindformers_glm32k.data.batching import (
    UNPACKED_COLUMNS,
    BatchPadding,
    FixedSequences,
    PaddingCounter,
    RaggedSequences,
    TruncationCounter,
    fixed_batches,
    packed_batches,
    ragged_batches,
)
from mindformers_glm32k.data.encode import IGNORED, ON_LONG_ANSWER, RAISE, SampleEncoder, padded
from mindformers_glm32k.data.loader import EpochSampler, StreamSampler, samples_of
from mindformers_glm32k.data.packing import COLUMNS as PACKED_COLUMNS
from mindformers_glm32k.data.packing import PlannedSequences, StreamedSequences, plan_sequences
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.data.tokens import TokenizedSamples, all_lengths, kept_lengths
from mindformers_glm32k.data.truncation import TRUNCATIONS
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.vocabulary import WordEncoder

SAMPLE, TOKEN = "sample", "token"
# Keys of the section, with their defaults (None: required, or no default).
DEFAULTS = {
    "data_loader": None,
    "tokenizer": None,
    "input_columns": UNPACKED_COLUMNS,
    "max_source_length": None,
    "max_target_length": None,
    "seq_length": None,
    "truncation": "middle",
    "on_long_answer": RAISE,
    "packing": False,
    "packing_window": 64,
    "rows_per_epoch": None,
    "documents_per_row": None,
    "loss_weights": SAMPLE,
    "sort_by_length": False,
    "pad_to_multiple_of": None,
    "cache_tokens": None,
    "cache_dir": None,
    "ignore_pad_token_for_loss": True,
    "batch_size": 8,
    "repeat": 1,
    "drop_remainder": True,
    "num_parallel_workers": 1,
    "python_multiprocessing": False,
    "seed": 0,
    "prefetch_size": 1,
    "numa_enable": False,
}
# Keys that MindFormers' trainer writes into the section or reads from it; ignored here.
_HOST_KEYS = (
    "do_eval auto_tune filepath_prefix autotune_per_step profile micro_batch_num output_columns construct_args_key "
    "mixup_op"
).split()
# Classes of MindFormers and of older versions, as found in users' YAMLs -> the class to use instead.
_OTHERS = {
    "data_loader": dict.fromkeys(
        ("ADGenDataLoader", "CommonDataLoader", "TrainingDataLoader", "MindDataset", "BaseDataLoader"),
        "GLM32KDataLoader",
    ),
    "tokenizer": dict.fromkeys(
        ("ChatGLM32kTokenizer", "ChatGLM3Tokenizer", "ChatGLM2Tokenizer", "ChatGLM4Tokenizer", "ChatGLMTokenizer"),
        "GLM32KTokenizer",
    ),
}
KNOWN_KEYS = frozenset(DEFAULTS) | frozenset(_HOST_KEYS)


class GLM32KDataset(BaseDataset):
    """Batches for training and evaluation; `encode.py` shows the layout of sequences, `packing.py` of packed ones.

    Calling it returns a MindSpore dataset, as MindFormers' own dataset classes do, with int32 columns input_ids and
    labels of shape (batch_size, sequence length); packed sequences have position_ids, document_ids and input_mask
    (float32) as well. In data-parallel mode each rank has its share of the sequences; where MindFormers feeds the whole
    global batch to each device (semi-auto parallel with full_batch), each rank has all sequences.

    Args:
        dataset_config: the `train_dataset` or `eval_dataset` section, with the keys

            - data_loader: a section with `type: GLM32KDataLoader`, or what that class returns.
            - tokenizer: a section with `type` and `vocab_file`, or a tokenizer.
            - max_source_length: tokens of the prompt, chat format included.
            - max_target_length: tokens of the answer without its end token, >= 1; a longer one is kept whole
              where the prompt can make room for it.
            - seq_length: sequence length, >= max_source_length + max_target_length + 1, which is the default.
            - truncation: how prompts that are too long are truncated: "middle" (default), "left", "right",
              "longbench" or "drop"; see truncation.py.
            - on_long_answer: "raise" (default) or "drop", where answers alone do not fit a sequence.
            - packing: several samples in a sequence. Default False.
            - packing_window: samples are packed in windows worth this many full sequences, >= 1. Default 64.
            - documents_per_row: samples of a packed sequence at most. Default: no limit; for an NPU with flash
              attention GLM32KTrainer sets model_config.documents_per_row.
            - rows_per_epoch: packed sequences of an epoch over all ranks, a multiple of ranks * batch_size. By default
              an epoch has each sample once; all samples are tokenized before the first step to plan it. With a value,
              sequences are packed during training, in pass after pass over the samples, and an epoch is this many
              sequences.
            - loss_weights: in packed sequences each "sample" (default) counts alike in the loss, or each "token".
            - sort_by_length: samples of about the same length share a batch. Default False.
            - pad_to_multiple_of: a batch is padded to its longest sequence, rounded up to a multiple of this
              and at most the sequence length, instead of to the sequence length: the batch shape varies, and each shape
              is compiled once.
            - cache_tokens: whether the samples' token counts, which packing without rows_per_epoch needs before the
              first step, are kept on disk for the next run. Default: from 8 MB of data on.
            - cache_dir: folder of these counts and of the line indexes of big files. Default: `.glm32k_cache` beside
              the data, or in the output folder where that is not writable.
            - input_columns: ["input_ids", "labels"], or those of packed sequences.
            - batch_size, repeat, prefetch_size: >= 1.
            - num_parallel_workers: >= 1, limited to the number of CPU cores.
            - drop_remainder, python_multiprocessing, numa_enable.
            - seed: >= 0; the data_loader's own `seed` takes precedence.
            - ignore_pad_token_for_loss: only True; padding is never in the loss.
        **kwargs: the same keys, when there is no dataset_config.

    Raises:
        InputError: unknown keys, wrong values, missing or unusable files, fewer sequences than one batch.
    """

    def __new__(cls, dataset_config: dict | None = None, **kwargs: Any) -> Dataset:
        config = checked(dataset_config or kwargs)
        cls.init_dataset_config(config)
        loader, tokens, pad_id = _parts(config, *cls._generate_shard_info())
        if config.packing:
            batches = packed_batches(*_packed(config, loader, tokens, pad_id), config)
        else:
            batches = _unpacked(config, loader, tokens, pad_id)
        return batches.repeat(config.repeat)


def first_sequences(dataset_config: dict) -> tuple[Iterator[tuple], SampleSource, Any]:
    """The sequences of the first epoch one by one, as in a run with a single rank.

    Returns:
        an iterator of (samples, documents, columns): indices of the samples, their EncodedSamples, and the columns by
        name, padded to the sequence length; the SampleSource; the tokenizer.
    """
    config = checked(dataset_config)
    loader, tokens, pad_id = _parts(config, None, None)

    def sequences():
        if config.packing:
            packed, sampler = _packed(config, loader, tokens, pad_id)
            for index in sampler:
                samples, documents = packed.documents(index)
                yield samples, documents, dict(zip(PACKED_COLUMNS, packed.columns(documents)))
        else:
            length = sequence_length(config)
            for sample in _sampler(config, loader, tokens):
                encoded = tokens[sample]
                ids, labels = padded(encoded.input_ids, length, pad_id), padded(encoded.labels, length, IGNORED)
                yield [sample], [encoded], {"input_ids": ids, "labels": labels}

    return sequences(), tokens.samples, tokens.tokenizer


def _parts(config, shard_id, num_shards):
    """The loader of this rank's samples, their TokenizedSamples, and the padding id."""
    loader = _loader(config, shard_id, num_shards)
    tokenizer = config.tokenizer
    if isinstance(tokenizer, dict):
        tokenizer = build_tokenizer(copy.deepcopy(tokenizer))
    tokens = _tokens(config, samples_of(loader), tokenizer)
    if not config.packing or config.rows_per_epoch:  # else all samples are tokenized before the first step anyway
        tokens.check_answers(logger)
    return loader, tokens, tokenizer.vocabulary.unk_id


def _tokens(config, samples, tokenizer):
    length = sequence_length(config)
    encoder = (
        SimpleNamespace(vocabulary=WordEncoder(tokenizer.vocabulary)) if hasattr(tokenizer, "vocabulary") else tokenizer
    )
    builder = SampleEncoder(
        encoder, config.max_source_length, config.max_target_length, length, config.truncation, config.on_long_answer
    )
    return TokenizedSamples(samples, builder, tokenizer)


def _lengths(config, tokens, order):
    """Tokens of each sample, int32 (samples,); read from disk where an earlier run has counted them."""
    names = ("max_source_length", "max_target_length", "truncation", "on_long_answer")
    settings = {**{name: config[name] for name in names}, "sequence_length": sequence_length(config)}
    section = dict(config.data_loader) if isinstance(config.data_loader, dict) else None
    kept = kept_lengths(
        tokens.samples, tokens.tokenizer, settings, section, config.cache_tokens, config.cache_dir, logger
    )
    start = len(tokens) * order["shard_id"] // order["num_shards"]
    return all_lengths(tokens, config.num_parallel_workers, start, kept)


def _sampler(config, loader, tokens):
    if config.sort_by_length:
        loader.sampler.sort_by(tokens.samples.sizes(), config.batch_size * loader.sampler.order()["num_shards"])
    return loader.sampler


def _unpacked(config, loader, tokens, pad_id):
    section = config.data_loader
    if not config.drop_remainder and isinstance(section, dict) and section.get("phase") == "eval":
        loader.sampler.keep_all()
    samples, length = loader.get_dataset_size(), sequence_length(config)
    if config.drop_remainder and samples < config.batch_size:
        raise InputError(
            f"{samples} records make no batch of batch_size={config.batch_size}; give more records, "
            "a smaller batch_size, or set drop_remainder: False"
        )
    _sampler(config, loader, tokens)
    truncations, padding = _counters(config, tokens.samples, samples, samples)
    if config.pad_to_multiple_of:
        return ragged_batches(
            loader,
            RaggedSequences(tokens, length, pad_id, truncations, None),
            BatchPadding(config.pad_to_multiple_of, length, pad_id, padding),
            config,
        )
    return fixed_batches(loader, FixedSequences(tokens, length, pad_id, truncations, padding), config)


def _packed(config, loader, tokens, pad_id):
    """The packed sequences and the sampler of their indices."""
    length, order, equal = sequence_length(config), loader.sampler.order(), config.loss_weights == SAMPLE
    shards, batch = order["num_shards"], config.batch_size if config.drop_remainder else 1
    if config.rows_per_epoch:
        if config.rows_per_epoch % (batch * shards):
            raise InputError(
                f"rows_per_epoch: {config.rows_per_epoch} is not a multiple of batch_size={batch} times "
                f"{shards} ranks; take {-(-config.rows_per_epoch // (batch * shards)) * batch * shards}"
            )
        count = config.rows_per_epoch // shards
        counters = _counters(config, tokens.samples, len(tokens) // shards, count)
        return StreamedSequences(
            config.packing_window,
            config.documents_per_row,
            order,
            config.num_parallel_workers,
            tokens,
            length,
            pad_id,
            equal,
            *counters,
        ), StreamSampler(count)
    lengths = _lengths(config, tokens, order)
    plan = plan_sequences(lengths, length, config.packing_window, order, batch, config.documents_per_row)
    documents, total, left_out = int((lengths > 0).sum()), int(lengths.sum()), int((lengths == 0).sum())
    logger.info(
        "packing: %d samples in %d sequences of %d tokens, %.1f %% of them padding; %d samples left out",
        documents,
        len(plan),
        length,
        100 * (1 - total / (len(plan) * length)),
        left_out,
    )
    if not all(plan):
        raise InputError(
            f"packing: {documents} samples are too few for a batch of {batch} sequences on each of {shards} "
            "ranks; give more samples, a smaller batch_size, or set packing: False"
        )
    counters = _counters(config, tokens.samples, documents // shards, len(plan) // shards)
    return PlannedSequences(plan, lengths, tokens, length, pad_id, equal, *counters), EpochSampler(len(plan), **order)


def _counters(config, samples, samples_per_epoch, sequences_per_epoch):
    return (
        TruncationCounter(samples.location, samples_per_epoch, logger, config.truncation),
        PaddingCounter(sequences_per_epoch, logger),
    )


def check_vocabulary(tokenizer: Any, padded_vocab_size: int) -> None:
    """Raises InputError when the tokenizer has ids, special tokens included, that the model's embedding lacks."""
    if tokenizer.vocab_size > padded_vocab_size:
        raise InputError(
            f"the vocabulary {getattr(tokenizer, 'vocab_file', '') or ''} has {tokenizer.vocab_size} ids, "
            f"special tokens included, and model_config.padded_vocab_size={padded_vocab_size} has room "
            "for fewer; set padded_vocab_size to at least that, or take the model's own tokenizer.model"
        )


def _loader(config, shard_id, num_shards):
    """The GeneratorDataset of this rank's samples."""
    loader = config.data_loader
    if isinstance(loader, dict):
        loader = MindFormerConfig(**copy.deepcopy(dict(loader)))
        loader.update(num_shards=num_shards, shard_id=shard_id, column_names=["sample"])
        if loader.get("cache_dir") is None:
            loader.cache_dir = config.cache_dir
        if loader.get("seed") is None:
            loader.seed = config.seed
        loader = build_dataset_loader(loader)
    if samples_of(loader) is None or loader.column_names != ["sample"]:
        raise InputError(
            "data_loader: a section with type GLM32KDataLoader is needed, or what that class returns "
            'with column_names=["sample"]'
        )
    return loader


def checked(dataset_config: dict) -> MindFormerConfig:
    """A copy of the section with the defaults filled in; InputError names what is wrong with it."""
    reject_unknown(dataset_config, KNOWN_KEYS, "dataset_config")
    given = {key: value for key, value in dataset_config.items() if value is not None}
    config = MindFormerConfig()
    config.update({**DEFAULTS, **given})
    sequence_length(config)
    for name in ("batch_size", "repeat", "prefetch_size", "packing_window"):
        whole_number(config[name], name, 1)
    for name in ("rows_per_epoch", "documents_per_row", "pad_to_multiple_of"):
        if config[name] is not None:
            whole_number(config[name], name, 1)
    config.num_parallel_workers = workers(config.num_parallel_workers, "num_parallel_workers")
    whole_number(config.seed, "seed", 0)
    for name in ("drop_remainder", "python_multiprocessing", "numa_enable", "packing", "sort_by_length"):
        boolean(config[name], name)
    choice(config.cache_tokens, "cache_tokens", (None, True, False))
    choice(config.loss_weights, "loss_weights", (SAMPLE, TOKEN))
    for name in ("sort_by_length", "pad_to_multiple_of") if config.packing else ("rows_per_epoch", "documents_per_row"):
        if config[name]:
            raise InputError(f"{name}: {config[name]!r} has no meaning with packing: {config.packing}; remove it")
    choice(config.truncation, "truncation", tuple(TRUNCATIONS))
    choice(config.on_long_answer, "on_long_answer", ON_LONG_ANSWER)
    columns = PACKED_COLUMNS if config.packing else UNPACKED_COLUMNS
    if list(config.input_columns) not in (columns, UNPACKED_COLUMNS):
        raise InputError(f"input_columns: {config.input_columns!r} is not {columns}, the columns there are")
    if config.ignore_pad_token_for_loss is not True:
        raise InputError(
            f"ignore_pad_token_for_loss: {config.ignore_pad_token_for_loss!r} is not True; "
            "padding is never trained on, remove the key"
        )
    for name in ("data_loader", "tokenizer"):
        if config[name] is None:
            raise InputError(f"{name}: missing; give a section with its type")
        if isinstance(config[name], dict) and config[name].get("type") in _OTHERS[name]:
            ours = _OTHERS[name][config[name]["type"]]
            raise InputError(f"{name}.type: {config[name]['type']} does not serve GLM32KDataset; use {ours}")
    return config


def sequence_length(dataset_config: dict) -> int:
    """`seq_length` where it is given, else max_source_length + max_target_length + 1 (end token).

    Raises:
        InputError: lengths missing or no whole numbers, or seq_length smaller than source + target + 1.
    """
    source = whole_number(dataset_config.get("max_source_length"), "max_source_length", 1)
    target = whole_number(dataset_config.get("max_target_length"), "max_target_length", 1)
    needed, given = source + target + 1, dataset_config.get("seq_length")
    if given is None:
        return needed
    if whole_number(given, "seq_length", 1) < needed:
        raise InputError(
            f"seq_length={given} is smaller than max_source_length={source} + max_target_length={target} "
            f"+ 1 for the end token = {needed}; raise it or lower the lengths"
        )
    return given

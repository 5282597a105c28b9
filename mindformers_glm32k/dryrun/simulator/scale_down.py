"""A small model in the same layout (fewer layers, heads, positions, a smaller vocabulary; all switches and shardings as
they are), and prompts that fit it.

A simulation runs programs in NumPy to show that the layout computes what one device computes. This does not depend on
the sizes, as long as everything that the layout shards stays divisible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, lcm
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_glm32k.dryrun.simulator.state import sizes_of
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import FLASH_ATTENTION_STEP, layers_per_stage

LARGE = 100_000_000  # weights; larger models are scaled down by default
LARGEST_LENGTH = 2048  # tokens of a sequence; attention holds the whole score matrix
_HEAD, _VOCABULARY, _LENGTH = 16, 1024, 64
_DROPOUTS = tuple(
    f"model.model_config.{key}" for key in ("hidden_dropout", "attention_dropout", "pet_config.lora_dropout")
)
_ANSWER, _BLOCK = 16, 16  # tokens that prediction generates, at most; tokens of a block of its cache
_TOTAL_STEPS = 1000  # of the learning rate schedule, where it follows the data
_LOWEST_TOKEN = 3  # of random prompts: above the ids of padding and end of text


def num_weights(model: dict[str, Any]) -> int:
    """The number of weights by model_config, norms left out."""
    hidden, size = int(model["hidden_size"]), int(model["kv_channels"])
    heads, groups = int(model["num_attention_heads"]), int(model["multi_query_group_num"])
    layer = hidden * size * (2 * heads + 2 * groups) + 3 * hidden * int(model["ffn_hidden_size"])
    return int(model["num_layers"]) * layer + 2 * hidden * int(model["padded_vocab_size"])


def predicts(config: dict) -> bool:
    """Whether a merged configuration is for prediction."""
    return str(config.get("run_mode") or "").startswith("predict")


def prompts_of(config: dict) -> int:
    """Prompts of a batch by the trainer's rule: without a cache one, unless predict_batch_size says otherwise."""
    model = config["model"]["model_config"]
    return int(config.get("predict_batch_size") or (model.get("batch_size") if model.get("use_past") else None) or 1)


@dataclass(frozen=True)
class Request:
    """What is to be simulated."""

    config_file: str  # YAML of a training run or of prediction
    overrides: list[str]  # run_mindformer's other options
    output: Path  # folder of the results
    steps: int  # optimizer steps, or tokens to generate
    load_checkpoint: str | None = None  # whole checkpoint to start from; None: random weights
    scaled_down: bool | None = None  # None: where the model is large
    precision: str = "float32"  # dtype of everything, or "config": as the YAML has it
    traces: Sequence[str] = ()  # operators or parameters whose values are printed, see `train.make_watch`

    @property
    def arguments(self) -> list[str]:
        """run_mindformer's options."""
        return ["--config", str(Path(self.config_file).resolve()), *self.overrides]


@dataclass(frozen=True)
class Plan:
    """How a configuration is scaled down; dropout is always off."""

    overrides: list[str]  # run_mindformer's options
    changes: dict[str, list]  # by dotted key the old and the new value


def plan(config: dict, wanted: bool | None = None, checkpoint: str | PathLike | None = None) -> Plan:
    """Decides what is scaled down.

    `wanted`: None scales down models above LARGE weights and sequences above LARGEST_LENGTH tokens. The model takes the
    sizes of `checkpoint`; InputError where that has more than LARGE weights and `wanted` is not True.
    """
    model = config["model"]["model_config"]
    values = {}
    if checkpoint:
        given = sizes_of(checkpoint, config)
        if num_weights({**model, **given}) > LARGE and not wanted:
            raise InputError(
                f"load_checkpoint {checkpoint}: a model of {num_weights({**model, **given}):,} weights is too "
                "large to be simulated here; leave out load_checkpoint (random weights of a small model in "
                "the same layout show as much), or give a small checkpoint"
            )
        values.update({f"model.model_config.{key}": value for key, value in given.items()})
    elif wanted or (wanted is None and num_weights(model) > LARGE):
        values.update(_model_sizes(config))
    if wanted or (wanted is None and int(model["seq_length"]) > LARGEST_LENGTH):
        values.update(_prediction_lengths(config) if predicts(config) else _lengths(config))
    values.update({key: 0.0 for key in _DROPOUTS if _value(config, key)})  # two programs would drop different elements
    changes = {key: [_value(config, key), value] for key, value in values.items() if _value(config, key) != value}
    overrides = _options({key: value for key, (_, value) in changes.items()})
    parallel = config.get("parallel") or {}
    if config.get("use_parallel") and parallel.get("enable_parallel_optimizer"):
        # small parameters are sharded as large ones are
        threshold = {**(parallel.get("parallel_optimizer_config") or {}), "parallel_optimizer_threshold": 0}
        overrides += ["--parallel.parallel_optimizer_config", str(threshold)]
    return Plan(overrides, changes)


def _options(values):
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def _value(config, key):
    """The value of a dotted key, None where it is missing."""
    for part in key.split("."):
        config = (config or {}).get(part)
    return config


def _shards(config):
    """Over how many devices the model and the context are sharded."""
    parallel = (config.get("parallel_config") or {}) if config.get("use_parallel") else {}
    return (int(parallel.get(name) or 1) for name in ("model_parallel", "context_parallel"))


def _model_sizes(config):
    """Sizes of a small model that the layout shards as it shards the large one."""
    model = config["model"]["model_config"]
    model_parallel, context_parallel = _shards(config)
    heads = lcm(int(model["multi_query_group_num"]), model_parallel * context_parallel)
    heads *= -(-4 // heads)
    hidden = heads * _HEAD
    unit = _HEAD * model_parallel
    values = {
        "num_layers": _layers(config),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "kv_channels": _HEAD,
        "ffn_hidden_size": -(-hidden * 5 // (2 * unit)) * unit,
        "padded_vocab_size": min(_VOCABULARY, int(model["padded_vocab_size"])),
    }
    return {f"model.model_config.{key}": value for key, value in values.items()}


def _lengths(config):
    """Lengths of short sequences, with a loss (and MLP) that is still computed in several chunks."""
    _, context_parallel = _shards(config)
    unit = FLASH_ATTENTION_STEP * context_parallel
    length = -(-_LENGTH // unit) * unit
    source, run = length * 5 // 8, length // context_parallel
    chunked = config["model"]["model_config"].get("mlp_chunk_size")
    return {
        "model.model_config.seq_length": length,
        "model.model_config.loss_chunk_size": run // (4 if run >= 64 else 2),
        **({"model.model_config.mlp_chunk_size": run // 4} if chunked else {}),
        "train_dataset.max_source_length": source,
        "train_dataset.max_target_length": length - source - 1,
    }


def _prediction_lengths(config):
    """Short prompts with short answers, in a cache of several blocks a prompt and with room for one more prompt."""
    model = config["model"]["model_config"]
    block = gcd(int(model.get("block_size") or _BLOCK), _BLOCK)
    values = {
        "seq_length": _LENGTH,
        "max_new_tokens": _ANSWER,
        "block_size": block,
        "num_blocks": (prompts_of(config) + 1) * _LENGTH // block,
    }
    return {f"model.model_config.{key}": value for key, value in values.items()}


def _layers(config):
    """The fewest layers that keep the differences between the stages."""
    flat = [count for chunk in layers_per_stage(config) for count in chunk]
    fewer = min(flat) - 1
    return sum(flat) - fewer * len(flat) if len(flat) > 1 else min(2, flat[0])


def schedule_overrides(config: dict) -> list[str]:
    """Options for a schedule longer than the few simulated steps, in which the learning rate would decay to its end."""
    schedule = config.get("lr_schedule") or {}
    if int(schedule.get("total_steps") or -1) > 0:
        return []
    return ["--lr_schedule.total_steps", str(_TOTAL_STEPS)]


def one_device_overrides(batch_size: int) -> list[str]:
    """Options of the same step, of `batch_size` sequences in all, on one device."""
    values = {
        "use_parallel": False,
        "parallel_config.data_parallel": 1,
        "parallel_config.model_parallel": 1,
        "parallel_config.context_parallel": 1,
        "parallel_config.pipeline_stage": 1,
        "parallel_config.micro_batch_num": 1,
        "parallel_config.use_seq_parallel": False,
        "parallel_config.context_parallel_algo": "colossalai_cp",
        "parallel_config.ulysses_degree_in_cp": 1,
        "model.model_config.offset": 0,
        "model.model_config.pp_interleave_num": 1,
        "runner_config.gradient_accumulation_steps": 1,
        "micro_batch_interleave_num": 1,
        "runner_config.batch_size": batch_size,
        "train_dataset.batch_size": batch_size,
    }
    return _options(values)


def precision_overrides(dtype: str, kernels: str | None = None) -> list[str]:
    """Options that compute everything in one dtype.

    `kernels` is the compute dtype where kernels do not take `dtype`; angles of the rotary embedding then stay in
    `dtype`.
    """
    values = {"param_init_type": dtype, "compute_dtype": kernels or dtype, "residual_dtype": dtype}
    if kernels:
        values["rotary_dtype"] = dtype
    return _options({f"model.model_config.{key}": value for key, value in values.items()})


def make_prompts(config: dict, count: int, seed: int = 7) -> list[np.ndarray]:
    """Prompts of random tokens (int32), to generate `count` tokens each; several alternate between shorter and longer.
    InputError where `count` is above max_new_tokens."""
    prompts, length, answer = _prompt_sizes(config, count)
    more = min(answer - count, length // 2)
    lengths = [length] * prompts
    for index in range(0, prompts - 1, 2):
        lengths[index], lengths[index + 1] = length - more, length + more
    rng = np.random.default_rng(seed)
    vocab_size = int(config["model"]["model_config"]["padded_vocab_size"])
    return [rng.integers(_LOWEST_TOKEN, vocab_size, size).astype(np.int32) for size in lengths]


def check_prompts(prompts: Sequence[Sequence[int]], config: dict, count: int) -> list[np.ndarray]:
    """Prompts as int32 arrays, to generate `count` tokens each; InputError where they do not fit the programs.

    There must be `prompts_of(config)` of them, on average seq_length - max_new_tokens tokens long: the program is
    compiled for one flattened sequence of all.
    """
    expected, length, answer = _prompt_sizes(config, count)
    vocab_size = int(config["model"]["model_config"]["padded_vocab_size"])
    prompts = [np.asarray(ids, np.int32).reshape(-1) for ids in prompts]
    lengths = [len(ids) for ids in prompts]
    if len(prompts) != expected:
        raise InputError(
            f"{len(prompts)} prompts: {expected} are answered together (predict_batch_size, with use_past "
            "model_config.batch_size)"
        )
    if sum(lengths) != expected * length or max(lengths) + count > length + answer or min(lengths) < 1:
        raise InputError(
            f"prompts of {lengths} tokens: seq_length - max_new_tokens is {length}, they must be as long on "
            f"average and leave room for {count} tokens"
        )
    if any(((ids < 0) | (ids >= vocab_size)).any() for ids in prompts):
        raise InputError(f"prompts hold tokens outside of the vocabulary: model_config.padded_vocab_size={vocab_size}")
    return prompts


def _prompt_sizes(config, count):
    """(prompts, average tokens of a prompt, max_new_tokens)."""
    model = config["model"]["model_config"]
    answer = int(model.get("max_new_tokens") or 1)
    length = int(model["seq_length"]) - answer
    if count > answer:
        raise InputError(
            f"--execute {count}: model_config.max_new_tokens is {answer}; ask for fewer tokens or raise it"
        )
    if length < 1:
        raise InputError(
            f"model_config.max_new_tokens={answer}: no room for a prompt in seq_length={model['seq_length']}; "
            "lower the one or raise the other"
        )
    return prompts_of(config), length, answer

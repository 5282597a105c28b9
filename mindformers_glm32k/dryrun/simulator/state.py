"""Parameters of ranks: from a checkpoint or random, sharded for the first step, gathered and saved after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Program
from mindformers_glm32k.dryrun.simulator.interpreter import RankInterpreter
from mindformers_glm32k.dryrun.simulator.operators import Array, round_bfloat16
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.weights import convert, is_huggingface
from mindformers_glm32k.weights.checkpoint import open_source, weights_in
from mindformers_glm32k.weights.config_json import check_agreement
from mindformers_glm32k.weights.finding import config_of
from mindformers_glm32k.weights.names import COUNTER, SCRATCH_PREFIX, STATE_PREFIXES, dims_from_tensors, kind_of
from mindformers_glm32k.weights.strategy import ShardSpec
from mindformers_glm32k.weights.tensors import cast
from mindformers_glm32k.weights.writer import CheckpointWriter

_FILE_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
State = Mapping[str, Array]  # values by parameter name


def random_weights(state: State, seed: int = 0) -> dict[str, Array]:
    """One device's state with random weights, large enough to show mistakes: the loss is not that of uniform logits."""
    rng = np.random.default_rng(seed)
    result = dict(state)
    for name, value in state.items():
        if name.startswith(STATE_PREFIXES) or not name.endswith(("weight", "bias", "_lora_a", "_lora_b")):
            continue
        spread = 0.1 if value.ndim < 2 else value.shape[-1] ** -0.5
        if name.endswith("_lora_b"):
            spread = 0.02  # small beside the weight that it adapts, as after a few steps from zero
        center = 1.0 if "layernorm" in name and value.ndim == 1 else 0.0
        result[name] = (center + spread * rng.standard_normal(value.shape)).astype(value.dtype)
    return result


def sizes_of(path: str | PathLike, config: dict) -> dict[str, int]:
    """The sizes of model_config from the tensors of a checkpoint that `glm32k convert` reads, or of MindSpore's, whole.

    The number of key-value groups is taken from the configuration. InputError: no weights, or broken ones.
    """
    sizes = dims_from_tensors(weights_in(open_source(path).tensors))
    groups = int(config["model"]["model_config"]["multi_query_group_num"])
    if sizes.kv_rows % groups:
        raise InputError(
            f"{path}: {sizes.kv_rows} rows of keys are no multiple of model_config.multi_query_group_num={groups}"
        )
    size = sizes.kv_rows // groups
    return {
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden,
        "kv_channels": size,
        "num_attention_heads": sizes.q_rows // size,
        "ffn_hidden_size": sizes.ffn,
        "padded_vocab_size": sizes.vocab,
    }


def load_weights(path: str | PathLike, state: State, config: dict, work: Path) -> dict[str, Array]:
    """One device's state with the weights of a whole checkpoint: .ckpt, .safetensors, or a Hugging Face folder, which
    is converted in the folder `work`.

    Raises:
        InputError: weights are missing, have other shapes, or are of a model that differs in what shapes do not show.
    """
    model = config["model"]["model_config"]
    check_agreement(config_of(path), model, "model.model_config of the run")
    if is_huggingface(path):
        target = work / "converted.ckpt"
        convert(
            path,
            target,
            dtype="fp32",
            qkv_concat=bool(model.get("qkv_concat", True)),
            mlp_concat=bool(model.get("mlp_concat", True)),
        )
        path = target
    tensors = open_source(path).tensors
    result, wrong, taken = dict(state), [], 0
    for name, value in state.items():
        if name not in tensors or kind_of(name) == COUNTER:
            continue
        if tuple(tensors[name].shape) != value.shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}, expected {list(value.shape)}")
            continue
        result[name] = cast(tensors[name].load(), tensors[name].dtype, "fp32").astype(value.dtype)
        taken += 1
    missing = [name for name in state if name.startswith("transformer.") and name not in tensors and "lora" not in name]
    wrong += [f"{name} is missing" for name in missing]
    if wrong or not taken:
        raise InputError(
            f"{path}: does not fit the model of the YAML: {'; '.join(wrong[:5]) or 'no weight of it'}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}; check model_config's sizes, "
            "qkv_concat and mlp_concat"
        )
    return result


def initial_weights(path: str | PathLike | None, state: State, config: dict, work: Path) -> dict[str, Array]:
    """One device's state with the weights of a checkpoint (see `load_weights`), or random ones without it."""
    return load_weights(path, state, config, work) if path else random_weights(state)


def shard(
    program: Program, rank_in_stage: int, layouts: Mapping[str, ShardSpec], whole: State, counters: State
) -> dict[str, Array]:
    """What a rank holds before the first step.

    Args:
        rank_in_stage: the rank minus the first rank of its stage.
        layouts: of the stage; a parameter that is not in it is replicated.
        whole: values of one device.
        counters: the rank's own values of parameters that one device does not have.

    Raises:
        KeyError: a parameter of the program is in neither.
    """
    values = {}
    for name, spec in program.parameters.values():
        if name.startswith(SCRATCH_PREFIX):
            values[name] = np.zeros(spec.shape, np.float32)
        elif name in whole:
            values[name] = whole[name][_slices(layouts, name, rank_in_stage, whole[name].shape)]
        else:
            values[name] = counters[name]
        if spec.dtype == "bfloat16":
            values[name] = round_bfloat16(values[name])
    return values


def gather(
    interpreters: Sequence[RankInterpreter],
    ranks_of_stages: Sequence[range],
    layouts_of_stages: Sequence[Mapping[str, ShardSpec]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, Array], dict[str, tuple[list[int], float]]]:
    """Whole parameters of the given `shapes`, gathered from the shards of all ranks (`interpreters` by rank).

    Returns:
        The parameters; and for those whose copies differ between ranks, the ranks and the largest difference.
    """
    values, unequal = {}, {}
    for ranks, layouts in zip(ranks_of_stages, layouts_of_stages):
        for name, shape in shapes.items():
            holders = [rank for rank in ranks if name in interpreters[rank].parameters]
            if not holders:
                continue
            whole = values.setdefault(name, np.zeros(shape, interpreters[holders[0]].parameters[name].value.dtype))
            first = {}  # slices -> rank
            for rank in holders:
                slices = _slices(layouts, name, rank - ranks[0], shape)
                value = interpreters[rank].parameters[name].value
                key = str(slices)
                if key in first:
                    _note_difference(unequal, name, first[key], rank, whole[slices], value)
                else:
                    first[key] = rank
                    whole[slices] = value
    return values, unequal


def _slices(layouts, name, rank_in_stage, shape):
    """The shard of a whole parameter that a rank holds."""
    return layouts[name].slices(rank_in_stage, shape) if name in layouts else tuple(slice(None) for _ in shape)


def _note_difference(unequal, name, first, second, ours, theirs):
    if np.array_equal(ours, theirs, equal_nan=True):
        return
    difference = float(np.max(np.abs(ours.astype(np.float64) - theirs)))
    ranks, largest = unequal.get(name, ([first], 0.0))
    unequal[name] = (ranks + [second], max(largest, difference))


def save(interpreter: RankInterpreter, folder: Path, steps: int, prefix: str = "glm32k") -> None:
    """Writes what a rank holds after `steps` as a run's checkpoint: `rank_R/<prefix>_rank_R-1_<steps>.ckpt`."""
    entries: list[tuple[str, tuple[int, ...], str]] = []
    values: list[Any] = []
    for parameter in interpreter.parameters.values():
        if not parameter.name.startswith(SCRATCH_PREFIX):
            dtype = _FILE_DTYPES.get(parameter.dtype, parameter.dtype.capitalize())
            entries.append((parameter.name, parameter.value.shape, dtype))
            values.append(_file_values(parameter))
    for name, count in (("epoch_num", 1), ("step_num", steps)):
        entries.append((name, (), "Int32"))
        values.append(np.array(count, np.int32).tobytes())
    name = f"rank_{interpreter.rank}"
    target = Path(folder) / name / f"{prefix}_{name}-1_{steps}.ckpt"
    with atomic_path(target) as path, CheckpointWriter.for_file(path, entries) as writer:
        for (entry, _, _), value in zip(entries, values):
            writer.write(entry, value)
        writer.finish()


def _file_values(parameter):
    """A parameter's values as the file holds them: bit patterns of bfloat16, bytes of counters."""
    if parameter.dtype == "bfloat16":
        return cast(np.ascontiguousarray(parameter.value).reshape(-1), "fp32", "bf16")
    return parameter.value if parameter.dtype in _FILE_DTYPES else np.ascontiguousarray(parameter.value).tobytes()

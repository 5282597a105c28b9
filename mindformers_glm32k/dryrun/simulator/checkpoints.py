"""Weights for a rehearsal from a checkpoint, and the checkpoints that its ranks leave."""

from pathlib import Path

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.weights import convert, is_huggingface
from mindformers_glm32k.weights.checkpoint import open_source
from mindformers_glm32k.weights.dtypes import cast
from mindformers_glm32k.weights.model_dims import sizes_from_tensors
from mindformers_glm32k.weights.parameters import COUNTER, SCRATCH_PREFIX, kind_of
from mindformers_glm32k.weights.plan import weights_in
from mindformers_glm32k.weights.writer import CheckpointWriter

_FILE_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def sizes_of(path, config):
    """The model's sizes by a checkpoint's tensors.

    Args:
        path (str | os.PathLike): any checkpoint that `glm32k convert` reads, or a whole one of MindSpore.
        config (dict): merged configuration; the number of key-value groups is taken from it.

    Returns:
        dict[str, int]: by key of model_config.

    Raises:
        InputError: no weights, or broken ones.
    """
    sizes = sizes_from_tensors(weights_in(open_source(path).tensors))
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


def load_weights(path, state, config, work):
    """Replaces the weights of one device's state by those of a checkpoint.

    Args:
        path (str | os.PathLike): a whole checkpoint: .ckpt, .safetensors, or a Hugging Face folder.
        state (dict[str, numpy.ndarray]): values of one device by parameter name.
        config (dict): merged configuration.
        work (pathlib.Path): for intermediate files.

    Returns:
        dict[str, numpy.ndarray]: like `state`.

    Raises:
        InputError: weights are missing or have other shapes.
    """
    model = config["model"]["model_config"]
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


def save(machine, folder, steps, prefix="glm32k"):
    """Writes what a rank holds as a run's checkpoint: `rank_R/<prefix>_rank_R-1_<steps>.ckpt`.

    Args:
        machine (Machine): the rank.
        folder (pathlib.Path): the checkpoint folder.
        steps (int): that were executed.
        prefix (str): of the file's name.
    """
    entries, values = [], []
    for parameter in machine.parameters.values():
        if not parameter.name.startswith(SCRATCH_PREFIX):
            dtype = _FILE_DTYPES.get(parameter.dtype, parameter.dtype.capitalize())
            entries.append((parameter.name, parameter.value.shape, dtype))
            values.append(_file_values(parameter))
    for name, count in (("epoch_num", 1), ("step_num", steps)):
        entries.append((name, (), "Int32"))
        values.append(np.array(count, np.int32).tobytes())
    name = f"rank_{machine.rank}"
    with atomic_path(Path(folder) / name / f"{prefix}_{name}-1_{steps}.ckpt") as path:
        with CheckpointWriter(path, entries) as writer:
            for (entry, _, _), value in zip(entries, values):
                writer.write(entry, value)
            writer.finish()


def _file_values(parameter):
    """A parameter's values as the file holds them: bit patterns of bfloat16, bytes of counters."""
    if parameter.dtype == "bfloat16":
        return cast(np.ascontiguousarray(parameter.value).reshape(-1), "fp32", "bf16")
    return parameter.value if parameter.dtype in _FILE_DTYPES else np.ascontiguousarray(parameter.value).tobytes()

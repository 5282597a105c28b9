"""A small model in the same layout: fewer layers, heads, words and positions, all switches and all cuts as they are.

A rehearsal executes programs in NumPy; what it is to show (that the layout computes what one device computes) does not
depend on the sizes, as long as everything that the layout cuts stays divisible.
"""

from dataclasses import dataclass
from math import gcd, lcm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import FLASH_ATTENTION_STEP, layers_per_stage

LARGE = 100_000_000  # weights; models above are shrunk unless asked otherwise
LARGEST_LENGTH = 2048  # tokens of a row; attention is executed with all its scores
_HEAD, _VOCABULARY, _LENGTH = 16, 1024, 64
_DROPOUTS = tuple(
    f"model.model_config.{key}" for key in ("hidden_dropout", "attention_dropout", "pet_config.lora_dropout")
)
_ANSWER, _BLOCK = 16, 16  # tokens that prediction generates, at most; tokens of a block of its cache
_TOTAL_STEPS = 1000  # of the learning rate schedule, where it follows the data


def weights_of(model):
    """int: the model's number of weights, norms left out.

    Args:
        model (dict): model_config.
    """
    hidden, size = int(model["hidden_size"]), int(model["kv_channels"])
    heads, groups = int(model["num_attention_heads"]), int(model["multi_query_group_num"])
    layer = hidden * size * (2 * heads + 2 * groups) + 3 * hidden * int(model["ffn_hidden_size"])
    return int(model["num_layers"]) * layer + 2 * hidden * int(model["padded_vocab_size"])


def predicts(config):
    """bool: whether a configuration is for prediction.

    Args:
        config (dict): merged configuration.
    """
    return str(config.get("run_mode") or "").startswith("predict")


def prompts_of(config):
    """int: prompts that are answered together, as the trainer has it: without a cache one by one, unless asked for.

    Args:
        config (dict): merged configuration.
    """
    model = config["model"]["model_config"]
    return int(config.get("predict_batch_size") or (model.get("batch_size") if model.get("use_past") else None) or 1)


@dataclass(frozen=True)
class Plan:
    """How a configuration is made small.

    Args:
        overrides (list[str]): run_mindformer's options.
        changes (dict[str, list]): by dotted key the old and the new value; dropout is always off.
    """

    overrides: list
    changes: dict


def plan(config, wanted=None, checkpoint=None):
    """Decides what is made small.

    Args:
        config (dict): merged configuration.
        wanted (bool | None): shrink, or do not; by default models above LARGE weights and rows above LARGEST_LENGTH
            tokens are shrunk.
        checkpoint (str | None): whose sizes the model must have.

    Returns:
        Plan

    Raises:
        InputError: the checkpoint's model is large, or shrinking was asked for although its sizes are given.
    """
    model = config["model"]["model_config"]
    values = {}
    if checkpoint:
        from mindformers_glm32k.dryrun.simulator.checkpoints import sizes_of

        given = sizes_of(checkpoint, config)
        if weights_of({**model, **given}) > LARGE and not wanted:
            raise InputError(
                f"load_checkpoint {checkpoint}: a model of {weights_of({**model, **given}):,} weights is too "
                "large to be executed here; leave out load_checkpoint (random weights of a small model in "
                "the same layout show as much), or give a small checkpoint"
            )
        values.update({f"model.model_config.{key}": value for key, value in given.items()})
    elif wanted or (wanted is None and weights_of(model) > LARGE):
        values.update(_model_sizes(config))
    if wanted or (wanted is None and int(model["seq_length"]) > LARGEST_LENGTH):
        values.update(_prediction_lengths(config) if predicts(config) else _lengths(config))
    values.update({key: 0.0 for key in _DROPOUTS if _value(config, key)})  # two programs would drop different elements
    changes = {key: [_value(config, key), value] for key, value in values.items() if _value(config, key) != value}
    overrides = [word for key, (_, value) in changes.items() for word in (f"--{key}", str(value))]
    parallel = config.get("parallel") or {}
    if config.get("use_parallel") and parallel.get("enable_parallel_optimizer"):
        # small parameters are sharded as large ones are
        threshold = {**(parallel.get("parallel_optimizer_config") or {}), "parallel_optimizer_threshold": 0}
        overrides += ["--parallel.parallel_optimizer_config", str(threshold)]
    return Plan(overrides, changes)


def _value(config, key):
    """The value of a dotted key, None where it is missing."""
    for part in key.split("."):
        config = (config or {}).get(part)
    return config


def _cut(config):
    """How often model, context and layers are cut."""
    parallel = (config.get("parallel_config") or {}) if config.get("use_parallel") else {}
    return (int(parallel.get(name) or 1) for name in ("model_parallel", "context_parallel"))


def _model_sizes(config):
    """Sizes of a small model that the layout cuts as it cuts the large one."""
    model = config["model"]["model_config"]
    model_parallel, context_parallel = _cut(config)
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
    """Lengths of short rows, with a loss (and MLP) that is still computed in several chunks."""
    _, context_parallel = _cut(config)
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
    """Short prompts with short answers, in a cache of several blocks a prompt and one more prompt than there are."""
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
    """As few layers as keep what the offset adds to each stage."""
    flat = [count for row in layers_per_stage(config) for count in row]
    fewer = min(flat) - 1
    return sum(flat) - fewer * len(flat) if len(flat) > 1 else min(2, flat[0])


def schedule_overrides(config):
    """list[str]: options that keep the learning rate from ending with the few rows that are read."""
    schedule = config.get("lr_schedule") or {}
    if int(schedule.get("total_steps") or -1) > 0:
        return []
    return ["--lr_schedule.total_steps", str(_TOTAL_STEPS)]


def one_device_overrides(rows):
    """The same step on one device.

    Args:
        rows (int): of the global batch.

    Returns:
        list[str]
    """
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
        "runner_config.batch_size": rows,
        "train_dataset.batch_size": rows,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def precision_overrides(dtype, kernels=None):
    """Options that compute everything in one dtype.

    Args:
        dtype (str): "float32", "float16", "bfloat16".
        kernels (str | None): what the program is compiled for where kernels do not take that dtype; angles of the rotary
            embedding then stay in it.

    Returns:
        list[str]
    """
    values = {"param_init_type": dtype, "compute_dtype": kernels or dtype, "residual_dtype": dtype}
    if kernels:
        values["rotary_dtype"] = dtype
    return [word for key, value in values.items() for word in (f"--model.model_config.{key}", value)]

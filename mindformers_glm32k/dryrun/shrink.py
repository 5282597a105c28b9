"""A small model in the same layout: fewer layers, heads, words and positions, all switches and all cuts as they are.

A rehearsal executes programs in NumPy; what it is to show (that the layout computes what one device computes) does not
depend on the sizes, as long as everything that the layout cuts stays divisible.
"""
from math import lcm

from mindformers_glm32k.dryrun.layout_checks import FLASH_ATTENTION_STEP, layers_per_stage

LARGE = 200_000_000  # weights; models above are shrunk unless asked otherwise
_HEAD, _VOCABULARY, _LENGTH = 16, 1024, 64
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


def sizes(config):
    """The small model's sizes.

    Args:
        config (dict): merged configuration.

    Returns:
        dict[str, int]: by dotted key of the configuration.
    """
    model = config["model"]["model_config"]
    parallel = (config.get("parallel_config") or {}) if config.get("use_parallel") else {}
    cut = {name: int(parallel.get(name) or 1) for name in ("model_parallel", "context_parallel", "pipeline_stage")}
    groups = int(model["multi_query_group_num"])
    heads = lcm(groups, cut["model_parallel"] * cut["context_parallel"])
    heads *= -(-4 // heads)
    hidden = heads * _HEAD
    unit = FLASH_ATTENTION_STEP * cut["context_parallel"]
    length = -(-_LENGTH // unit) * unit
    source = length * 5 // 8
    run = length // cut["context_parallel"]
    values = {
        "num_layers": _layers(config), "hidden_size": hidden, "num_attention_heads": heads, "kv_channels": _HEAD,
        "ffn_hidden_size": hidden * 5 // 2 // (16 * cut["model_parallel"]) * 16 * cut["model_parallel"],
        "padded_vocab_size": min(_VOCABULARY, int(model["padded_vocab_size"])), "seq_length": length,
        # as many chunks as fit, so that there are several
        "loss_chunk_size": run // 4 if run >= 64 else run // 2,
    }
    values = {f"model.model_config.{key}": value for key, value in values.items()}
    for section in ("train_dataset",):
        values.update({f"{section}.max_source_length": source, f"{section}.max_target_length": length - source - 1})
    return values


def _layers(config):
    """As few layers as keep what the offset adds to each stage."""
    counts = layers_per_stage(config)
    flat = [count for row in counts for count in row]
    fewer = min(flat) - 1
    layers = sum(flat) - fewer * len(flat)
    return layers if len(flat) > 1 else min(2, flat[0])


def overrides(config):
    """run_mindformer's options that make a configuration small.

    Args:
        config (dict): merged configuration.

    Returns:
        list[str]
    """
    options = [word for key, value in sizes(config).items() for word in (f"--{key}", str(value))]
    parallel = config.get("parallel") or {}
    if config.get("use_parallel") and parallel.get("enable_parallel_optimizer"):
        # small parameters are sharded as large ones are
        options += ["--parallel.parallel_optimizer_config", "{parallel_optimizer_threshold: 0}"]
    return options


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
    values = {"use_parallel": False, "parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1,
              "parallel_config.context_parallel": 1, "parallel_config.pipeline_stage": 1,
              "parallel_config.micro_batch_num": 1, "parallel_config.use_seq_parallel": False,
              "parallel_config.context_parallel_algo": "colossalai_cp", "parallel_config.ulysses_degree_in_cp": 1,
              "model.model_config.offset": 0, "model.model_config.pp_interleave_num": 1,
              "runner_config.gradient_accumulation_steps": 1, "micro_batch_interleave_num": 1,
              "runner_config.batch_size": rows, "train_dataset.batch_size": rows}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def precision_overrides(dtype):
    """list[str]: options that compute everything in one dtype ("float32", "float16", "bfloat16")."""
    keys = ["param_init_type", "compute_dtype", "residual_dtype"]
    options = [word for key in keys for word in (f"--model.model_config.{key}", dtype)]
    return options

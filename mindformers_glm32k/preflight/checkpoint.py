"""Compares a checkpoint file with a network before anything is loaded: MindFormers loads what fits and trains the
rest from random numbers without a word."""

import os

from mindformers_glm32k.errors import InputError

# Optimizer states that a training checkpoint holds beside the weights.
_STATE_PREFIXES = ("adam_m.", "adam_v.", "moments.", "moment1.", "moment2.", "accu_grads.", "exp_avg.", "exp_avg_sq.")
_SHOWN = 5


def check_checkpoint(path, network):
    """Refuses a checkpoint whose weights are not those of the network.

    Folders (per-rank or per-layer files) are left to MindFormers, which knows their layout.

    Args:
        path (str): checkpoint file, .ckpt or .safetensors.
        network (Cell): the network that will load it.

    Raises:
        InputError: missing, extra or misshapen parameters, all named with their shapes.
    """
    if not os.path.isfile(path):
        return
    from mindformers_glm32k.weights.formats.ckpt import read_index

    stored = {name: tuple(shape) for name, (shape, _) in read_index(path).items()}
    wanted, optional = _parameters(network)
    problems = []
    missing = [name for name in wanted if name not in stored]
    extra = [
        name for name in stored if name not in wanted and name not in optional and not _is_state(name, stored[name])
    ]
    shapes = [
        f"{name} is {stored[name]} in the file, {shape} in the model"
        for name, shape in {**wanted, **optional}.items()
        if name in stored and stored[name] != shape
    ]
    for what, names in (("missing", missing), ("not in the model", extra), ("of another shape", shapes)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
    if problems:
        raise InputError(
            f"{path} does not fit the model: {'; '.join(problems)}. Check model_config (num_layers, sizes, "
            "qkv_concat and mlp_concat must be those the file was made with; `glm32k convert` writes "
            "either layout)"
        )


def _is_state(name, shape):
    """Whether an entry is an optimizer state or one of the trainer's counters: scalars such as epoch_num."""
    return name.startswith(_STATE_PREFIXES) or ("." not in name and shape in ((), (1,)))


def _parameters(network):
    """Names and shapes that a checkpoint must have, and those it may have (LoRA adapters, caches)."""
    wanted, optional = {}, {}
    for parameter in network.get_parameters():
        may_lack = "mindpet_delta" in parameter.name or parameter.name.endswith(("key_cache", "value_cache"))
        (optional if may_lack else wanted)[parameter.name] = tuple(parameter.shape)
    return wanted, optional

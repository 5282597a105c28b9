"""What the entries of a training checkpoint are: weights, adapters, optimizer states, counters; and their shapes."""

import re

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.names import slot_of
from mindformers_glm32k.weights.tensors import open_for_reading, read_exactly

WEIGHT, ADAPTER, STATE, COUNTER = "weight", "adapter", "state", "counter"
STATE_PREFIXES = ("adam_m.", "adam_v.", "accu_grads.", "moments.", "moment1.", "moment2.", "exp_avg.", "exp_avg_sq.")
# Sums of gradients that a pipeline starts from zero in each step: no checkpoint needs them.
SCRATCH_PREFIX = "accu_grads."
_ADAPTER = re.compile(r"(?P<layer>.+)\.mindpet_delta_lora_(?P<side>[ab])$")
_CACHE = re.compile(r"(.*\.)?(key_cache|value_cache)(_grad)?$")


def kind_of(name):
    """What an entry is.

    Args:
        name (str): as in a checkpoint or strategy file.

    Returns:
        str | None: WEIGHT, ADAPTER, STATE, or COUNTER (epoch, step, loss scale and other numbers beside the model);
        None for buffers that no checkpoint needs, such as caches of generation.
    """
    if name.startswith(STATE_PREFIXES):
        return STATE
    if _ADAPTER.match(name):
        return ADAPTER
    try:
        is_weight = slot_of(name) is not None
    except InputError:  # of a model that somebody extended, cut like any other; or a number that a trainer keeps
        is_weight = "." in name
    if is_weight:
        return WEIGHT
    return None if _CACHE.match(name) or "inv_freq" in name else COUNTER


def plain_name(name):
    """The parameter that a state belongs to; other names are their own."""
    prefix = next((prefix for prefix in STATE_PREFIXES if name.startswith(prefix)), "")
    return name[len(prefix) :]


def adapter_of(name):
    """Where an adapter's matrix belongs.

    Args:
        name (str): "….query_key_value.mindpet_delta_lora_a" and the like, as MindFormers' LoRA names them.

    Returns:
        tuple[str, str] | None: the weight that it changes, and "a" or "b"; None for other names.
    """
    match = _ADAPTER.match(name)
    return (match["layer"] + ".weight", match["side"]) if match else None


def expected_shape(sizes, name):
    """The whole shape of a weight, adapter or state.

    Args:
        sizes (sizes.Sizes): of the model.
        name (str): as in a checkpoint.

    Returns:
        tuple[int | None, ...] | None: None stands for the rank of an adapter, which the model's sizes do not tell;
        None in all for parameters that are not this model's.
    """
    name = plain_name(name)
    weight, side = adapter_of(name) or (name, None)
    try:
        slot = slot_of(weight)
    except InputError:
        slot = None
    if slot is None:
        return None
    shape = sizes.shape(slot)
    return {"a": (None, shape[-1]), "b": (shape[0], None)}.get(side, shape)


def fits(shape, expected):
    """Whether a shape is as `expected_shape` says."""
    return (
        expected is None
        or len(shape) == len(expected)
        and all(wanted in (None, found) for wanted, found in zip(expected, shape))
    )


def raw_bytes(tensor):
    """The bytes of a small entry of any dtype, as a counter.

    Args:
        tensor (StoredTensor): where it lies.

    Returns:
        bytes
    """
    content = b""
    with open_for_reading(tensor.file) as handle:
        for offset, nbytes in tensor.segments:
            buffer = bytearray(nbytes)
            read_exactly(handle, offset, memoryview(buffer), tensor)
            content += bytes(buffer)
    return content

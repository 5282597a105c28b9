"""What a split cuts: every tensor of a whole checkpoint held against the strategy before anything is written."""

from dataclasses import dataclass
from math import prod

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.dtypes import ITEM_SIZE
from mindformers_glm32k.weights.model_dims import sizes_from_tensors
from mindformers_glm32k.weights.parameter_layout import ParameterLayout
from mindformers_glm32k.weights.parameters import (
    ADAPTER,
    COUNTER,
    SCRATCH_PREFIX,
    STATE,
    STATE_PREFIXES,
    WEIGHT,
    expected_shape,
    fits,
    kind_of,
)
from mindformers_glm32k.weights.plan import raise_problems, weights_in
from mindformers_glm32k.weights.reshard import stored_bytes
from mindformers_glm32k.weights.tensors import StoredTensor

_OTHER_MODEL = "the checkpoint and the strategy are of different models or layouts (num_layers, qkv_concat, LoRA)"


@dataclass
class SplitPlan:
    """What goes where.

    Args:
        tensors: the whole tensors, by name.
        stages: per stage the layouts of what is cut for it.
        devices: ranks of a stage.
        counters: entries that every rank gets as they are.
        left_out: names in the checkpoint that no rank needs or the strategy does not know.
    """

    tensors: dict[str, StoredTensor]
    stages: list[dict[str, ParameterLayout]]
    devices: int
    counters: list[StoredTensor]
    left_out: list[str]

    @property
    def world(self):
        """int: all ranks."""
        return self.devices * len(self.stages)

    def cost(self, name, layout):
        """int: bytes of all ranks' parts of a tensor."""
        tensor = self.tensors[name]
        return stored_bytes(tensor.shape, tensor.dtype) // prod(layout.parts) * self.devices


def stage_devices(stages):
    """int: ranks of each stage, from its layouts."""
    return max(layout.devices for layouts in stages for layout in layouts.values())


def make_plan(source, stages, sizes=None):
    """Decides what is cut.

    Args:
        source (source.Source): the whole checkpoint.
        stages (list[dict[str, ParameterLayout]]): the strategy.
        sizes (sizes.Sizes | None): of the model; None takes them from the tensors.

    Returns:
        SplitPlan: without adapters where the checkpoint has none: a LoRA run starts from its base.

    Raises:
        InputError: one message names all that is missing, left over, of another shape, or cannot be cut.
    """
    tensors = source.tensors
    sizes = sizes or sizes_from_tensors(weights_in(tensors))
    known = {name: layout for layouts in stages for name, layout in layouts.items()}
    prefixes = {
        prefix
        for prefix in STATE_PREFIXES
        if prefix != SCRATCH_PREFIX
        and any(name.startswith(prefix) for name in tensors)
        and any(n.startswith(prefix) for n in known)
    }
    kinds = (WEIGHT, ADAPTER) if any(kind_of(name) == ADAPTER for name in tensors) else (WEIGHT,)
    wanted = {name for name in known if kind_of(name) in kinds or name.startswith(tuple(prefixes))}
    wanted |= {name for name in known if name.startswith(SCRATCH_PREFIX) and name in tensors}
    problems = [f"{source.path}: missing: {name!r}" for name in known if name in wanted and name not in tensors]
    counters, left_out = [], []
    for name, tensor in tensors.items():
        kind = kind_of(name)
        if name in wanted:
            problems += _misfits(tensor, known[name], sizes)
        elif kind == COUNTER:
            counters.append(tensor)
        elif kind in (None, STATE):
            left_out.append(name)
        else:
            problems.append(f"{tensor.file}: key {name!r} is left over: the strategy has no such parameter")
    try:
        raise_problems(source.path, problems)
    except InputError as error:
        raise InputError(f"{error}\n{_OTHER_MODEL}, or the file is incomplete") from None
    chosen = [{name: layouts[name] for name in tensors if name in layouts and name in wanted} for layouts in stages]
    return SplitPlan(tensors, chosen, stage_devices(stages), counters, left_out)


def _misfits(tensor, layout, sizes):
    """What is wrong with a tensor: its dtype, its shape, or that it cannot be cut."""
    if tensor.dtype not in ITEM_SIZE:
        yield f"{tensor.file}: key {tensor.name!r} has dtype {tensor.dtype}, {', '.join(ITEM_SIZE)} can be cut"
        return
    expected = expected_shape(sizes, tensor.name)
    if not fits(tensor.shape, expected):
        yield f"{tensor.file}: key {tensor.name!r} has shape {tensor.shape}, expected {expected}"
        return
    try:
        layout.slice_shape(tensor.shape)
    except InputError as error:
        yield f"{tensor.file}: key {tensor.name!r}: {error}"

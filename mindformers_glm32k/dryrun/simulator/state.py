"""Parameters of ranks: cut from one device's before the first step, put together again after the last one."""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators.values import round_bfloat16
from mindformers_glm32k.weights.parameters import SCRATCH_PREFIX, STATE_PREFIXES


def random_weights(state, seed=0):
    """Weights with which mistakes show: large enough that the loss is not that of an even guess.

    Args:
        state (dict[str, numpy.ndarray]): values of one device.
        seed (int): of the random numbers.

    Returns:
        dict[str, numpy.ndarray]: like `state`, other weights.
    """
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


def cut(program, rank_in_stage, layouts, whole, counters):
    """What a rank holds before the first step.

    Args:
        program (Program): the rank's.
        rank_in_stage (int): the rank minus the first rank of its stage.
        layouts (dict[str, ParameterLayout]): of the stage; a parameter that is not in it is held whole.
        whole (dict[str, numpy.ndarray]): values of one device.
        counters (dict[str, numpy.ndarray]): the rank's own values of what one device does not have.

    Returns:
        dict[str, numpy.ndarray]

    Raises:
        KeyError: a parameter of the program is nowhere.
    """
    values = {}
    for name, spec in program.parameters.values():
        if name.startswith(SCRATCH_PREFIX):
            values[name] = np.zeros(spec.shape, np.float32)
        elif name in whole:
            values[name] = whole[name][slices_of(layouts, name, rank_in_stage, whole[name].shape)]
        else:
            values[name] = counters[name]
        if spec.dtype == "bfloat16":
            values[name] = round_bfloat16(values[name])
    return values


def join(machines, ranks_of_stages, layouts_of_stages, shapes):
    """Whole parameters from what all ranks hold.

    Args:
        machines (list[Machine]): by rank.
        ranks_of_stages (list[range]): the ranks of each stage.
        layouts_of_stages (list[dict[str, ParameterLayout]]): by stage.
        shapes (dict[str, tuple[int]]): whole shapes of what is wanted, by name.

    Returns:
        tuple[dict[str, numpy.ndarray], dict[str, tuple[list[int], float]]]: the parameters; and of those whose copies on
        several ranks differ the ranks and the largest difference.
    """
    values, unequal = {}, {}
    for ranks, layouts in zip(ranks_of_stages, layouts_of_stages):
        for name, shape in shapes.items():
            holders = [rank for rank in ranks if name in machines[rank].parameters]
            if not holders:
                continue
            whole = values.setdefault(name, np.zeros(shape, machines[holders[0]].parameters[name].value.dtype))
            first = {}  # part -> rank
            for rank in holders:
                place = slices_of(layouts, name, rank - ranks[0], shape)
                value = machines[rank].parameters[name].value
                key = str(place)
                if key in first:
                    note_difference(unequal, name, first[key], rank, whole[place], value)
                else:
                    first[key] = rank
                    whole[place] = value
    return values, unequal


def slices_of(layouts, name, rank_in_stage, shape):
    """tuple[slice]: the part of a whole parameter that a rank holds."""
    return layouts[name].slices(rank_in_stage, shape) if name in layouts else tuple(slice(None) for _ in shape)


def note_difference(unequal, name, first, second, ours, theirs):
    """Enters a parameter whose copies differ into `unequal`."""
    if np.array_equal(ours, theirs, equal_nan=True):
        return
    difference = float(np.max(np.abs(ours.astype(np.float64) - theirs)))
    ranks, largest = unequal.get(name, ([first], 0.0))
    unequal[name] = (ranks + [second], max(largest, difference))

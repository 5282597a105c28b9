"""Compares what all ranks computed with what one device computed."""

from dataclasses import dataclass

import numpy as np

from mindformers_glm32k.weights.parameters import plain_name

# An element whose gradient in some step is this small beside the parameter's largest has rounding noise for a gradient (the
# bias of the keys, which softmax does not see; a few of any weight). AdamW makes steps of full size out of noise: such
# elements of weights are left out, their moments are compared.
NOISE = 1e-4


@dataclass(frozen=True)
class Tolerance:
    """Relative differences that are allowed.

    Args:
        loss (float), norm (float): of the value itself.
        weights (float), moments (float): of the parameter's largest element.
    """

    loss: float
    norm: float
    weights: float
    moments: float


# float32: the order of additions. 16 bits: every operator rounds, and the two programs cut their sums at other places.
TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-5, 1e-5, 1e-5),
    "float16": Tolerance(2e-3, 2e-2, 2e-3, 0.1),
    "bfloat16": Tolerance(1e-2, 0.1, 2e-2, 0.5),
}


@dataclass
class ParameterDifference:
    """How far a parameter is from one device's.

    Args:
        name (str): its name.
        largest (float): absolute difference, noise left out.
        relative (float): that, beside the parameter's largest element.
        noise (int): elements left out.
    """

    name: str
    largest: float
    relative: float
    noise: int


class NoiseWatch:
    """Finds the elements of weights whose gradient is rounding noise in some step, from the first moments of AdamW.

    Args:
        beta (float): of the first moment: m = beta * m + (1 - beta) * gradient.
    """

    def __init__(self, beta):
        self.beta = beta
        self.before = {}
        self.masks = {}

    def after_step(self, parameters):
        """To be called after every step.

        Args:
            parameters (dict[str, Parameter]): of one device.
        """
        for name, parameter in parameters.items():
            if name.startswith("adam_m."):
                moment = parameter.value.astype(np.float64)
                gradient = np.abs(moment - self.beta * self.before.get(name, 0.0))
                self.before[name] = moment
                weight = plain_name(name)
                noisy = gradient <= NOISE * gradient.max(initial=0.0)
                self.masks[weight] = self.masks.get(weight, False) | noisy


def compare_parameters(whole, one_device, noise=None):
    """Compares joined parameters with one device's.

    Args:
        whole (dict[str, numpy.ndarray]): of the layout, put together.
        one_device (dict[str, numpy.ndarray]): values of the same names.
        noise (dict[str, numpy.ndarray] | None): elements to leave out, by weight; see `NoiseWatch`.

    Returns:
        list[ParameterDifference]: of weights, moments and counters, the largest relative difference first.
    """
    found = []
    for name, value in whole.items():
        reference = np.asarray(one_device[name], np.float64)
        difference = np.abs(reference - value)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        # where both are equal nothing is left out
        left_out = (difference > 0) & (noise or {}).get(name, False)
        largest = float(difference[~left_out].max(initial=0.0))
        scale = float(np.abs(reference).max(initial=0.0))
        found.append(
            ParameterDifference(name, largest, largest / scale if scale else float(largest > 0), int(left_out.sum()))
        )
    return sorted(found, key=lambda item: -item.relative)


def disagreements(steps, parameters, unequal, unread, tolerance):
    """What does not agree, in words.

    Args:
        steps (list[dict]): of execution.json.
        parameters (list[ParameterDifference]): see `compare_parameters`.
        unequal (dict): copies that differ, see `state.join`.
        unread (list[str]): messages that nobody received.
        tolerance (Tolerance): what is allowed.

    Returns:
        list[str]
    """
    found = []
    for number, step in enumerate(steps, 1):
        for name, allowed in (("loss", tolerance.loss), ("grad_norm", tolerance.norm)):
            ours, reference = step[name], step[f"{name}_one_device"]
            if ours is None or reference is None:
                continue
            if not close(ours, reference, allowed):
                found.append(
                    f"step {number}: {name} is {ours:.9g}, on one device {reference:.9g} "
                    f"(ratio {ours / reference if reference else float('inf'):.6f})"
                )
        for name in ("overflow", "loss_scale", "learning_rate"):
            if step[name] != step[f"{name}_one_device"]:
                found.append(f"step {number}: {name} is {step[name]}, on one device {step[f'{name}_one_device']}")
        for name in ("loss", "grad_norm"):
            if step.get(f"{name}_differs"):
                found.append(f"step {number}: ranks report different values of {name}: {step[f'{name}_differs']}")
    for item in parameters:
        allowed = tolerance.weights if plain_name(item.name) == item.name else tolerance.moments
        if item.relative > allowed:
            found.append(
                f"{item.name} differs from one device's by {item.largest:.3g}, {item.relative:.3g} of its "
                f"largest element (allowed: {allowed:g})"
            )
    for name, (ranks, largest) in sorted(unequal.items()):
        found.append(f"{name}: ranks {ranks} should hold equal copies, they differ by {largest:.3g}")
    return found + [f"a message that nobody receives: {what}" for what in unread]


def close(value, reference, allowed):
    """bool: equal within a relative tolerance; two values that are not finite are equal."""
    if not np.isfinite(reference) or not np.isfinite(value):
        return np.isfinite(reference) == np.isfinite(value)
    return abs(value - reference) <= allowed * max(abs(reference), 1e-12)

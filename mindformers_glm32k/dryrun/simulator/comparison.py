"""Compares what all ranks computed with what one device computed.

Letters: B prompts, N generated tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mindformers_glm32k.dryrun.simulator import operators, state
from mindformers_glm32k.dryrun.simulator.interpreter import RankInterpreter
from mindformers_glm32k.dryrun.simulator.operators import Parameter
from mindformers_glm32k.parallel import ParallelLayout
from mindformers_glm32k.weights.names import plain_name
from mindformers_glm32k.weights.strategy import ShardSpec

# Gradients below NOISE times the parameter's largest one are rounding noise (the bias of the keys, to which softmax is
# invariant; a few elements of any weight). AdamW turns noise into updates of full size: elements of weights with such a
# gradient in some step are not compared, their moments are.
NOISE = 1e-4


@dataclass(frozen=True)
class Tolerance:
    """Allowed relative differences: of loss and norm to their value, of weights and moments to the largest element."""

    loss: float
    norm: float
    weights: float
    moments: float


# float32 differs by the order of additions; in 16 bits every operator rounds, and the programs split sums differently.
TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-5, 1e-5, 1e-5),
    "float16": Tolerance(2e-3, 2e-2, 2e-3, 0.1),
    "bfloat16": Tolerance(1e-2, 0.1, 2e-2, 0.5),
}
LOGIT_TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}  # of the largest logit, for the same reasons


@dataclass
class TrainingRun:
    """Results of a training layout's run."""

    interpreters: list[RankInterpreter]  # by rank
    outputs: list[list]  # per step and rank
    unread: list[str] = field(default_factory=list)  # messages that nobody received
    seconds: float = 0.0
    noise: dict[str, np.ndarray] = field(default_factory=dict)  # see `NoiseWatch`, of one device


@dataclass
class GenerationRun:
    """Results of greedy decoding by all ranks of a layout."""

    interpreters: list[dict[str, RankInterpreter]]  # by rank and phase
    tokens: list[np.ndarray]  # by rank, (B, N)
    logits: list[np.ndarray]  # by rank, (N, B, V)
    unread: list[str]  # messages that nobody received
    seconds: float = 0.0


@dataclass
class ParameterDifference:
    """How far a parameter is from one device's."""

    name: str
    largest: float  # absolute difference, noise left out
    relative: float  # `largest` over the parameter's largest element
    noise: int  # elements left out


class NoiseWatch:
    """Finds the elements of weights whose gradient is rounding noise in some step, from the first moments of AdamW:
    m = beta * m + (1 - beta) * gradient. `masks` has a bool array per weight."""

    def __init__(self, beta: float):
        self.beta = beta
        self.before = {}
        self.masks = {}

    def after_step(self, parameters: Mapping[str, Parameter]) -> None:
        """Updates the masks; to be called after every step with the parameters of one device."""
        for name, parameter in parameters.items():
            if name.startswith("adam_m."):
                moment = parameter.value.astype(np.float64)
                gradient = np.abs(moment - self.beta * self.before.get(name, 0.0))
                self.before[name] = moment
                weight = plain_name(name)
                noisy = gradient <= NOISE * gradient.max(initial=0.0)
                self.masks[weight] = self.masks.get(weight, False) | noisy


def compare_training(
    result: TrainingRun,
    reference: TrainingRun,
    layouts: Sequence[Mapping[str, ShardSpec]],
    layout: ParallelLayout,
    config: dict,
) -> dict:
    """The results in execution.json: a layout's run compared with one device's (`reference`).

    `layouts` are those of the parameters, by stage; `config` is the merged configuration.
    """
    factor = layout.micro_batches * int(config.get("micro_batch_interleave_num") or 1)
    accumulate = int((config.get("runner_config") or {}).get("gradient_accumulation_steps") or 1)
    factor *= accumulate if layout.stages == 1 else 1
    steps = [_step(ranks, one[0], layout, factor) for ranks, one in zip(result.outputs, reference.outputs)]
    one_device = {name: parameter.value for name, parameter in reference.interpreters[0].parameters.items()}
    shapes = {name: value.shape for name, value in one_device.items()}
    ranks_of_stages = [layout.ranks_of(stage) for stage in range(layout.stages)]
    whole, unequal = state.gather(result.interpreters, ranks_of_stages, layouts, shapes)
    differences = compare_parameters(whole, one_device, reference.noise)
    dtype = config["model"]["model_config"]["compute_dtype"]
    problems = disagreements(steps, differences, unequal, result.unread, TOLERANCES[dtype])
    problems += [f"{name} is held by no rank" for name in sorted(set(shapes) - set(whole))]
    weights = [item for item in differences if plain_name(item.name) == item.name]
    moments = [item for item in differences if plain_name(item.name) != item.name]
    return {
        "agrees": not problems,
        "problems": problems,
        "tolerance": vars(TOLERANCES[dtype]),
        "steps": steps,
        "largest_weight_difference": max((item.largest for item in weights), default=0.0),
        "largest_weight_difference_relative": max((item.relative for item in weights), default=0.0),
        "largest_moment_difference_relative": max((item.relative for item in moments), default=0.0),
        "largest_differences": [vars(item) for item in differences[:10]],
        "elements_left_out_as_noise": sum(item.noise for item in weights),
        "unequal_copies": {name: {"ranks": ranks, "largest": largest} for name, (ranks, largest) in unequal.items()},
        "non_finite": _first_of_steps(result.interpreters),
        "non_finite_one_device": _first_of_steps(reference.interpreters),
        "collectives": _collectives([("", interpreter) for interpreter in result.interpreters]),
    }


def _first_of_steps(interpreters):
    """For each step, the first operator on any rank with a result that is not finite."""
    first = {}
    for item in sorted((item for one in interpreters for item in one.non_finite), key=lambda item: item.when):
        first.setdefault(item.step, item)
    return [
        {"step": step + 1, "rank": item.rank, "place": item.place, "output": item.output}
        for step, item in sorted(first.items())
    ]


def _collectives(interpreters):
    """Calls of each collective, for execution.json, from pairs of a phase (of prediction) and an interpreter."""
    counted = [
        (kind, one.rank, phase, count)
        for phase, one in interpreters
        for kind, count in operators.collectives_of(one.op_counts).items()
    ]
    return [
        {"kind": kind, "rank": rank, **({"phase": phase} if phase else {}), "count": count}
        for kind, rank, phase, count in sorted(counted, key=lambda item: item[:3])
    ]


def _step(ranks, one, layout, factor):
    """One step of execution.json from the programs' results: loss, overflow, loss scale, learning rate, norm."""
    last = layout.ranks_of(layout.stages - 1)
    losses = [_scalar(ranks[rank][0]) / factor for rank in last]
    norms = [_scalar(output[4]) if len(output) > 4 else None for output in ranks]
    step = {
        "loss": losses[0],
        "loss_one_device": _scalar(one[0]),
        "grad_norm": norms[0],
        "grad_norm_one_device": _scalar(one[4]) if len(one) > 4 else None,
        "learning_rate": _scalar(ranks[0][3]),
        "learning_rate_one_device": _scalar(one[3]),
        "loss_scale": _scalar(ranks[0][2]),
        "loss_scale_one_device": _scalar(one[2]),
        "overflow": any(bool(np.all(output[1])) for output in ranks),
        "overflow_one_device": bool(np.all(one[1])),
    }
    if any(loss != losses[0] and not (np.isnan(loss) and np.isnan(losses[0])) for loss in losses):
        step["loss_differs"] = losses
    if any(norm != norms[0] for norm in norms) and np.isfinite(norms[0]):
        step["grad_norm_differs"] = norms
    return step


def _scalar(value):
    return None if value is None else float(np.asarray(value).reshape(-1)[0])


def compare_parameters(
    whole: Mapping[str, np.ndarray], one_device: Mapping[str, np.ndarray], noise: Mapping[str, np.ndarray] | None = None
) -> list[ParameterDifference]:
    """Gathered parameters of a layout compared with one device's: weights, moments and counters, the largest relative
    difference first; `noise` masks the elements to leave out, by weight, see `NoiseWatch`.

    Moments of a bias are scaled by the larger of their own and its weight's largest element: softmax is invariant to
    the bias of the keys, so that the terms of its gradient cancel and only their rounding is left.
    """

    def size(name):
        return float(np.abs(one_device.get(name, 0.0)).max(initial=0.0))

    found = []
    for name, value in whole.items():
        reference = np.asarray(one_device[name], np.float64)
        difference = np.abs(reference - value)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        # equal elements do not count as left out
        left_out = (difference > 0) & (noise or {}).get(name, False)
        largest = float(difference[~left_out].max(initial=0.0))
        scale = size(name)
        if name.endswith(".bias") and plain_name(name) != name:
            scale = max(scale, size(name[: -len("bias")] + "weight"))
        found.append(
            ParameterDifference(name, largest, largest / scale if scale else float(largest > 0), int(left_out.sum()))
        )
    return sorted(found, key=lambda item: -item.relative)


def disagreements(
    steps: Iterable[dict],
    parameters: Iterable[ParameterDifference],
    unequal: Mapping[str, tuple[list[int], float]],
    unread: list[str],
    tolerance: Tolerance,
) -> list[str]:
    """One message for each disagreement.

    `steps` are those of execution.json, `unequal` the copies that differ, `unread` the messages that nobody received.
    """
    found = []
    for index, step in enumerate(steps, 1):
        for name, allowed in (("loss", tolerance.loss), ("grad_norm", tolerance.norm)):
            ours, reference = step[name], step[f"{name}_one_device"]
            if ours is None or reference is None:
                continue
            if not close(ours, reference, allowed):
                found.append(
                    f"step {index}: {name} is {ours:.9g}, on one device {reference:.9g} "
                    f"(ratio {ours / reference if reference else float('inf'):.6f})"
                )
        for name in ("overflow", "loss_scale", "learning_rate"):
            if step[name] != step[f"{name}_one_device"]:
                found.append(f"step {index}: {name} is {step[name]}, on one device {step[f'{name}_one_device']}")
        for name in ("loss", "grad_norm"):
            if step.get(f"{name}_differs"):
                found.append(f"step {index}: ranks report different values of {name}: {step[f'{name}_differs']}")
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


def close(value: float, reference: float, allowed: float) -> bool:
    """Equal within a relative tolerance; two values that are not finite are equal."""
    if not np.isfinite(reference) or not np.isfinite(value):
        return bool(np.isfinite(reference) == np.isfinite(value))
    return bool(abs(value - reference) <= allowed * max(abs(reference), 1e-12))


def compare_generation(result: GenerationRun, reference: GenerationRun, allowed: float) -> dict:
    """The results in execution.json: the tokens and logits of a layout compared with one device's.

    A prompt's logits are compared up to its first token that differs: after it the two read different texts. `allowed`
    is a difference of logits relative to the largest logit.
    """
    ours, theirs = result.tokens[0], reference.tokens[0]  # (B, N)
    ours_logits, their_logits = result.logits[0], reference.logits[0]  # (N, B, V)
    scale = float(np.abs(their_logits[np.isfinite(their_logits)]).max(initial=0.0)) or 1.0
    ranked = np.sort(their_logits, -1)
    margins = ranked[..., -1] - ranked[..., -2]  # (N, B)
    problems, ties, steps = unequal_ranks(result), [], []
    for index in range(ours.shape[1]):
        same = (ours[:, :index] == theirs[:, :index]).all(1)
        difference = _largest(ours_logits[index, same], their_logits[index, same])
        steps.append(
            {
                "tokens": ours[:, index].tolist(),
                "tokens_one_device": theirs[:, index].tolist(),
                "logit_difference": difference,
                "smallest_margin": float(margins[index].min()),
            }
        )
        if difference > allowed * scale:
            problems.append(
                f"token {index + 1}: logits differ from one device's by {difference:.3g}, "
                f"{difference / scale:.3g} of the largest logit (allowed: {allowed:g})"
            )
        for prompt in np.flatnonzero(same & (ours[:, index] != theirs[:, index])):
            text = (
                f"token {index + 1} of prompt {prompt} is {ours[prompt, index]}, on one device {theirs[prompt, index]} "
                f"(margin there {margins[index, prompt]:.3g})"
            )
            (ties if margins[index, prompt] <= 2 * allowed * scale else problems).append(text)
    problems += [f"a message that nobody receives: {what}" for what in result.unread]
    largest = max((step["logit_difference"] for step in steps), default=0.0)
    interpreters = [(phase, one) for phases in result.interpreters for phase, one in phases.items()]
    return {
        "agrees": not problems,
        "problems": problems,
        "near_ties": ties,
        "tolerance": allowed,
        "tokens": ours.tolist(),
        "tokens_one_device": theirs.tolist(),
        "largest_logit": scale,
        "largest_logit_difference": largest,
        "largest_logit_difference_relative": largest / scale,
        "steps": steps,
        "non_finite": [vars(event) for _, one in interpreters for event in one.non_finite],
        "collectives": _collectives(interpreters),
    }


def unequal_ranks(result: GenerationRun) -> list[str]:
    """One message for each rank whose tokens or logits differ from rank 0's."""
    found = []
    for rank, (tokens, logits) in enumerate(zip(result.tokens, result.logits)):
        if not np.array_equal(tokens, result.tokens[0]):
            prompt, index = np.argwhere(tokens != result.tokens[0])[0]
            found.append(
                f"rank {rank} chooses {tokens[prompt, index]} as token {index + 1} of prompt {prompt}, rank 0 "
                f"{result.tokens[0][prompt, index]}"
            )
        elif not np.array_equal(logits, result.logits[0], equal_nan=True):
            found.append(
                f"ranks 0 and {rank} should hold equal logits, they differ by {_largest(logits, result.logits[0]):.3g}"
            )
    return found


def _largest(ours, theirs):
    """The largest difference; infinite where one side is not finite."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(ours.astype(np.float64) - theirs)
    return float(np.where(np.isfinite(difference), difference, np.inf).max(initial=0.0))

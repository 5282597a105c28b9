"""Compares the tokens and logits of all ranks with one device's.

Letters: B prompts, N generated tokens, V words.
"""

import numpy as np

from mindformers_glm32k.dryrun.simulator import operators

# Of the largest logit. float32: the order of additions. 16 bits: every operator rounds, and the programs cut their sums at
# other places.
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def compare(result, reference, allowed):
    """Compares an execution with one device's.

    A prompt's logits are compared up to its first token that differs: behind it the two read different texts.

    Args:
        result (Generated), reference (Generated): of the layout, of one device.
        allowed (float): difference of logits, beside the largest logit.

    Returns:
        dict: the part of execution.json that holds results.
    """
    ours, theirs = result.tokens[0], reference.tokens[0]  # (B, N)
    ours_logits, their_logits = result.logits[0], reference.logits[0]  # (N, B, V)
    scale = float(np.abs(their_logits[np.isfinite(their_logits)]).max(initial=0.0)) or 1.0
    ranked = np.sort(their_logits, -1)
    margins = ranked[..., -1] - ranked[..., -2]  # (N, B)
    problems, ties, steps = unequal_ranks(result), [], []
    for number in range(ours.shape[1]):
        same = (ours[:, :number] == theirs[:, :number]).all(1)
        difference = _largest(ours_logits[number, same], their_logits[number, same])
        steps.append(
            {
                "tokens": ours[:, number].tolist(),
                "tokens_one_device": theirs[:, number].tolist(),
                "logit_difference": difference,
                "smallest_margin": float(margins[number].min()),
            }
        )
        if difference > allowed * scale:
            problems.append(
                f"token {number + 1}: logits differ from one device's by {difference:.3g}, "
                f"{difference / scale:.3g} of the largest logit (allowed: {allowed:g})"
            )
        for row in np.flatnonzero(same & (ours[:, number] != theirs[:, number])):
            text = (
                f"token {number + 1} of prompt {row} is {ours[row, number]}, on one device {theirs[row, number]} "
                f"(margin there {margins[number, row]:.3g})"
            )
            (ties if margins[number, row] <= 2 * allowed * scale else problems).append(text)
    problems += [f"a message that nobody receives: {what}" for what in result.unread]
    largest = max((step["logit_difference"] for step in steps), default=0.0)
    machines = [machine for generator in result.generators for machine in generator.machines.values()]
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
        "non_finite": [vars(event) for machine in machines for event in machine.non_finite],
        "collectives": collectives(result),
    }


def unequal_ranks(result):
    """list[str]: ranks that choose other tokens than rank 0, or whose copies of the logits are not equal to its."""
    found = []
    for rank, (tokens, logits) in enumerate(zip(result.tokens, result.logits)):
        if not np.array_equal(tokens, result.tokens[0]):
            row, number = np.argwhere(tokens != result.tokens[0])[0]
            found.append(
                f"rank {rank} chooses {tokens[row, number]} as token {number + 1} of prompt {row}, rank 0 "
                f"{result.tokens[0][row, number]}"
            )
        elif not np.array_equal(logits, result.logits[0], equal_nan=True):
            found.append(
                f"ranks 0 and {rank} should hold equal logits, they differ by {_largest(logits, result.logits[0]):.3g}"
            )
    return found


def collectives(result):
    """list[dict]: {"kind", "rank", "phase", "count"} of what was executed."""
    counted = {
        (kind, machine.rank, phase): count
        for generator in result.generators
        for phase, machine in generator.machines.items()
        for kind, count in operators.collectives_of(machine.executed).items()
    }
    return [
        {"kind": kind, "rank": rank, "phase": phase, "count": count}
        for (kind, rank, phase), count in sorted(counted.items())
    ]


def _largest(ours, theirs):
    """float: the largest difference; infinite where one side is not finite."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(ours.astype(np.float64) - theirs)
    return float(np.where(np.isfinite(difference), difference, np.inf).max(initial=0.0))

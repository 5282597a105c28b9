"""Figures of a stage's program as one flat table, so that programs can be added, scaled and extrapolated."""

from __future__ import annotations

from collections import defaultdict

from mindformers_glm32k.dryrun.analysis.analyze import TERMS, WEIGHTS
from mindformers_glm32k.dryrun.analysis.extrapolate import LAYERS
from mindformers_glm32k.dryrun.analysis.order import ORDERS

# ("bytes", order), ("states",), ("matmul", dtype), ("collective", kind, ranks, what, …), …
Figures = dict[tuple, float]

_STATES = ("weights", "gradients", "optimizer")  # persistent memory; gradients are the accumulated ones
PHASES = ("passes", "update")  # forward and backward; clipping and optimizer
_OF_MEMORY = frozenset(("bytes", "states", *_STATES, *PHASES, *TERMS))


def figures_of(program: dict) -> Figures:
    """The figures of a program of report.json that estimate and search read."""
    found: Figures = {("states",): program["total_bytes"] - program["activation_peak_bytes"]}
    peaks = program["at_peak_by_order"]
    found.update({(name, order): found["states",] + peaks[order][name] for name in PHASES for order in ORDERS})
    for name, key in zip(_STATES, ("parameter_bytes", "accumulator_bytes", "optimizer_bytes")):
        found[name,] = program[key]
    found.update({(name, order): peaks[order][name] for name in TERMS for order in ORDERS})
    work = program["work"]
    for kind in ("matmul", "attention"):
        found.update({(kind, dtype): count for dtype, count in work[f"{kind}_flops"].items()})
    found["vector",] = work["vector_bytes"]
    sums = defaultdict(float)
    for item in program["collectives"]:
        once = WEIGHTS in item["purpose"]
        for what in ("bytes", "count"):
            sums["collective", item["kind"], tuple(item["group_ranks"]), once, what] += item[what]
    return settled({**found, **sums})


def settled(figures: Figures) -> Figures:
    """Adds the bytes of each order: the maximum of its phases; only the phases are linear in the layers."""
    return {**figures, **{("bytes", order): max(figures[phase, order] for phase in PHASES) for order in ORDERS}}


def program_of(figures: Figures, stage: int) -> dict:
    """What `report.estimate` reads of a program."""
    collectives = [
        {
            "kind": key[1],
            "group_ranks": list(key[2]),
            "bytes": size,
            "count": figures.get((*key[:-1], "count"), 0),
            "once": key[3],
        }
        for key, size in figures.items()
        if key[0] == "collective" and key[-1] == "bytes"
    ]
    flops = {f"{kind}_flops": {key[1]: value for key, value in figures.items() if key[0] == kind} for kind in _CUBE}
    return {"stage": stage, "work": {**flops, "vector_bytes": figures["vector",]}, "collectives": collectives}


_CUBE = ("matmul", "attention")


def combine(*terms: tuple[float, Figures]) -> Figures:
    """The sum of (factor, figures) pairs."""
    total = defaultdict(float)
    for factor, figures in terms:
        for key, value in figures.items():
            total[key] += factor * value
    return dict(total)


def at_depth(shallow: Figures, deeper: Figures, layers: float) -> Figures:
    """Figures at `layers` layers, extrapolated linearly from programs of LAYERS layers."""
    steps = (layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    return settled({key: max(value, 0) for key, value in combine((1 - steps, shallow), (steps, deeper)).items()})


def with_sequences(figures: Figures, compiled: int, wanted: int) -> Figures:
    """Figures for another number of sequences a step: work scales with it; memory does not (sequences run one after the
    other), nor do the collectives of weights and their gradients (once a step)."""
    factor = wanted / compiled
    return {
        key: value if key[0] in _OF_MEMORY or key[0] == "collective" and key[3] else value * factor
        for key, value in figures.items()
    }


def fullest(stages: list[Figures], order: str) -> float:
    """Bytes of the fullest stage in an order of execution."""
    return max(figures["bytes", order] for figures in stages)


def memory_terms(figures: Figures, order: str) -> dict[str, float]:
    """Bytes of a stage by what takes them, the largest first."""
    found = {name: figures[name,] for name in _STATES}
    if figures["update", order] > figures["passes", order]:
        rest = "update"
    else:
        rest = "activations"
        found.update({name: figures[name, order] for name in TERMS})
    found[rest] = max(figures["bytes", order] - sum(found.values()), 0.0)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def best_order(stages: list[Figures]) -> str:
    """The order of execution that takes less memory."""
    return min(ORDERS, key=lambda order: fullest(stages, order))

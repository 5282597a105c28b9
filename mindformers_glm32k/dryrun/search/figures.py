"""Figures of a stage's program as one flat table, so that programs can be added, scaled and extrapolated."""

from __future__ import annotations

from collections import defaultdict

from mindformers_glm32k.dryrun.analysis.analyze import WEIGHTS
from mindformers_glm32k.dryrun.analysis.extrapolate import LAYERS
from mindformers_glm32k.dryrun.analysis.order import ORDERS

Figures = dict[
    tuple, float
]  # ("bytes", order), ("states",), ("matmul", dtype), ("collective", kind, ranks, what, …), …

_STATES = ("weights", "gradients", "optimizer")  # what a step keeps: accumulated gradients, AdamW's moments
_AT_PEAK = ("gathered", "logits")  # of the activations, by order: weights gathered for a product; what the loss makes
_OF_MEMORY = frozenset(("bytes", "states", *_STATES, *_AT_PEAK))


def figures_of(program: dict) -> Figures:
    """Those of a program of report.json that an estimate and a search read."""
    found: Figures = {("bytes", order): program["total_bytes_by_order"][order] for order in ORDERS}
    found["states",] = program["total_bytes"] - program["activation_peak_bytes"]
    for name, key in zip(_STATES, ("parameter_bytes", "accumulator_bytes", "optimizer_bytes")):
        found[name,] = program[key]
    found.update({(name, order): program["at_peak_by_order"][order][name] for name in _AT_PEAK for order in ORDERS})
    work = program["work"]
    for kind in ("matmul", "attention"):
        found.update({(kind, dtype): count for dtype, count in work[f"{kind}_flops"].items()})
    found["vector",] = work["vector_bytes"]
    sums = defaultdict(float)
    for item in program["collectives"]:
        once = WEIGHTS in item["purpose"]
        for what in ("bytes", "count"):
            sums["collective", item["kind"], tuple(item["group_ranks"]), once, what] += item[what]
    return {**found, **sums}


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
    """The weighted sum."""
    total = defaultdict(float)
    for factor, figures in terms:
        for key, value in figures.items():
            total[key] += factor * value
    return dict(total)


def at_depth(shallow: Figures, deeper: Figures, layers: float) -> Figures:
    """Extrapolated from programs of LAYERS layers."""
    steps = (layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    return {key: max(value, 0) for key, value in combine((1 - steps, shallow), (steps, deeper)).items()}


def with_sequences(figures: Figures, compiled: int, wanted: int) -> Figures:
    """The work of another number of sequences a step; memory stays, for one sequence comes after the other, and what
    moves weights and their gradients, which happens once."""
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
    found = {name: figures.get((name,), 0.0) for name in _STATES}
    found.update({name: figures.get((name, order), 0.0) for name in _AT_PEAK})
    found["activations"] = max(figures["bytes", order] - sum(found.values()), 0.0)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def best_order(stages: list[Figures]) -> str:
    """The order of execution that takes less memory."""
    return min(ORDERS, key=lambda order: fullest(stages, order))

"""The coefficients of `report.estimate.fitted`, by least squares over published speeds of the same NPUs.

published.json holds the figures with their sources: model sizes, layout and tokens/s per card from MindFormers' and
MindSpeed's documents. The work behind a figure is computed by the closed form of the search, for ChatGLM3-6B-32K by the
compiled programs. Software versions differ by a fifth on the same layout, which the error includes.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mindformers_glm32k.dryrun.report.estimate import ATLAS_800T_A2, WORK, at_peak, published
from mindformers_glm32k.dryrun.search.figures import combine, program_of
from mindformers_glm32k.dryrun.search.model import Dims, Model
from mindformers_glm32k.dryrun.search.space import Setting

# Where figures say little about a coefficient, it stays near this: products and attention at two thirds of the peak,
# memory at its bandwidth, two thirds of the communication not hidden.
_PRIOR = np.array([1.45, 1.6, 1.0, 0.7])
_WEIGHT = 0.05  # of the prior; a published figure weighs 1
_WHOLE_LOGITS = 10**9  # tokens of a loss chunk: the published runs do not chunk the loss


@dataclass(frozen=True)
class Figure:
    """A published speed.

    Args:
        what: model, length, layout.
        speed: tokens/s per card.
        source: document.
        report: of its programs, as `report.estimate` reads it.
    """

    what: str
    speed: float
    source: str
    report: dict


@functools.cache
def figures() -> tuple[Figure, ...]:
    """All published speeds."""
    compiled = {item.report["config"]: item.report for item in published()}
    data = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return tuple(
        Figure(
            item["what"],
            item["tokens_per_second_per_device"],
            item["source"],
            compiled[item["report"]] if "report" in item else _report(item),
        )
        for item in data
    )


def _report(item):
    layout = dict(item["layout"])
    whole = layout.pop("whole", ())
    setting = Setting(**{**layout, "layers": tuple(layout["layers"])})
    form = Model(Dims(loss_chunk=_WHOLE_LOGITS, bytes=2, adapters=False, **item["model"]))
    stages = []
    for stage, layers in enumerate(setting.layers):
        more = whole[stage] if whole else 0  # layers that are recomputed as a whole
        found = form.closed_form(setting, stage, layers - more)
        again = [form.closed_form(replace(setting, recompute="whole"), stage, count) for count in (more, 0)]
        stages.append(combine((1, found), (1, again[0]), (-1, again[1])) if more else found)
    pipeline = setting.pipeline_stage > 1
    return {
        "config": item["what"],
        "programs": [program_of(found, stage) for stage, found in enumerate(stages)],
        "layout_sizes": {"stages": setting.pipeline_stage, "micro_batches": setting.sequences if pipeline else 1},
        "tokens_per_step": setting.rows * form.dims.length,
        "world_size": setting.devices,
    }


def _shares(found: tuple[Figure, ...]) -> np.ndarray:
    """(figures, kinds of work): the part of the measured step that each kind would take at the device's peaks."""
    lines = []
    for figure in found:
        step = figure.report["tokens_per_step"] / figure.report["world_size"] / figure.speed
        parts = at_peak(figure.report, ATLAS_800T_A2)
        lines.append([parts[kind] / step for kind in WORK])
    return np.array(lines)


def fit(found: tuple[Figure, ...]) -> dict[str, float]:
    """Kind of work -> factor on its seconds at the device's peaks: least squares of the step time's relative errors,
    with a weak prior."""
    return dict(zip(WORK, map(float, _fit(_shares(found)))))


def _fit(shares):
    root = np.sqrt(_WEIGHT)
    matrix = np.vstack([shares, root * np.diag(1 / _PRIOR)])
    return np.linalg.lstsq(matrix, np.concatenate([np.ones(len(shares)), np.full(len(_PRIOR), root)]), rcond=None)[0]


def leave_one_out() -> list[tuple[Figure, float]]:
    """Each figure with the relative error of the speed that a fit to all others predicts."""
    found = figures()
    shares = _shares(found)
    return [
        (figure, float(1 / (shares[index] @ _fit(np.delete(shares, index, 0))) - 1))
        for index, figure in enumerate(found)
    ]


def spread() -> float:
    """Root mean square of log(estimate / figure), each figure left out of its own fit."""
    return float(np.sqrt(np.mean([np.log1p(error) ** 2 for _, error in leave_one_out()])))

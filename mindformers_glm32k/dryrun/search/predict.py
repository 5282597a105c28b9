"""The search for prediction: how many prompts fit a card's memory at once. The only layout is tensor parallel over all
NPUs, for a batch is one flattened sequence; memory is linear in the prompts, so two batch sizes are compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindformers_glm32k.checks import is_int
from mindformers_glm32k.dryrun.analysis.extrapolate import extrapolate
from mindformers_glm32k.dryrun.analysis.order import ORDERS
from mindformers_glm32k.dryrun.report.estimate import ATLAS_800T_A2, FITTED, seconds_of_program
from mindformers_glm32k.dryrun.search.measure import Programs
from mindformers_glm32k.dryrun.search.results import Candidate
from mindformers_glm32k.dryrun.search.search import Progress
from mindformers_glm32k.dryrun.search.space import applied
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import layout_problems

PHASES = ("prefill", "increment")
_PROBED = (1, 2)  # prompts of the programs that are compiled
_MOST = 256  # prompts
_FACTOR = 2.0  # of the interval: nothing published is fitted for prediction


@dataclass(frozen=True)
class Prompts:
    """A number of prompts on a number of NPUs.

    Args:
        model_parallel: NPUs.
        rows: prompts of a batch.
        block_size, length: tokens of a cache block and of a sequence.
    """

    model_parallel: int
    rows: int
    block_size: int
    length: int

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"mp{self.model_parallel}_prompts{self.rows}" if self.model_parallel > 1 else f"one_prompts{self.rows}"

    def keys(self, order: str | None = None) -> dict[str, Any]:
        """The YAML's keys, dotted."""
        parallel = self.model_parallel > 1
        keys = {
            "use_parallel": parallel,
            "parallel_config.data_parallel": 1,
            "parallel_config.model_parallel": self.model_parallel,
            "parallel_config.pipeline_stage": 1,
            "parallel_config.context_parallel": 1,
            "model.model_config.batch_size": self.rows,
            "model.model_config.num_blocks": -(-self.length // self.block_size) * self.rows,
        }
        if parallel:  # weights that are not concatenated are sharded without moving activations
            keys["model.model_config.qkv_concat"] = keys["model.model_config.mlp_concat"] = False
        return {**keys, **({"context.exec_order": order} if order else {})}


def search_prompts(
    written: Mapping[str, Any], merged: Mapping[str, Any], devices: int, limit: float, folder: Path
) -> list[Candidate]:
    """Batches of 1, 2, 4, … prompts and of the most that fit, the fastest that fit first, then the smallest that does
    not.

    Raises:
        InputError: the trainer refuses so many NPUs for prediction.
    """
    model = merged["model"]["model_config"]
    block = model.get("block_size")
    first = Prompts(devices, 1, block if is_int(block, 1) else 16, int(model["seq_length"]))
    problems = layout_problems(applied(merged, first.keys()), devices)
    if problems:
        raise InputError(f"--devices {devices}: {problems[0]}")
    programs, layers = Programs(folder, written), int(model["num_layers"])
    probes, progress = [], Progress()
    for index, rows in enumerate(_PROBED):
        progress.total = len(_PROBED) - index
        progress.say(f"2 and 4 layers with {rows} prompt{'s' * (rows > 1)}, prefill and decoding")
        shallow, deeper = programs.shallow(applied(written, replace(first, rows=rows).keys()))
        probes.append([extrapolate(*pair, layers) for pair in zip(shallow, deeper)])
        progress.done()
    answers = [_answer(replace(first, rows=rows), probes) for rows in range(1, _MOST + 1)]
    fit = [item for item in answers if item.bytes <= limit]
    shown = [item for item in fit if item in fit[-1:] or item.setting.rows & (item.setting.rows - 1) == 0]
    return sorted(shown, key=lambda item: -item.speed) + [item for item in answers if item.bytes > limit][:1]


def _answer(setting, probes):
    def at(value):
        one, two = (value(programs) for programs in probes)
        return one + (two - one) * (setting.rows - 1)

    def size(order):
        return at(lambda programs: max(program["total_bytes_by_order"][order] for program in programs))

    def seconds(kind):
        return at(lambda programs: seconds_of_program(_decoding(programs), ATLAS_800T_A2, 1.0)[kind])

    def terms(order):
        names = {"weights": "parameter_bytes", "cache": "cache_bytes"}
        found = {name: at(lambda programs, key=key: programs[0][key]) for name, key in names.items()}
        found["activations"] = max(size(order) - sum(found.values()), 0)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    parts = {kind: seconds(kind) for kind in FITTED}
    step = sum(FITTED[kind] * count for kind, count in parts.items())
    speed = setting.rows / step / setting.model_parallel
    order = min(ORDERS, key=size)
    interval = (speed / _FACTOR, speed * _FACTOR)
    roofline = setting.rows / sum(parts.values()) / setting.model_parallel
    parts["bubble"] = 0.0
    return Candidate(setting, speed, interval, roofline, step, parts, size(order), order, terms(order), known=True)


def _decoding(programs):
    """The program that computes one token of each prompt; without a cache it is that of the whole sequence."""
    return next((program for program in programs if program.get("phase") == PHASES[1]), programs[0])

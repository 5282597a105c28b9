"""Programs that no compiler made: a closed form with other factors than the search guesses, so that it has to learn."""

from __future__ import annotations

from dataclasses import replace

import yaml

from dryrun.tiny import CONFIG
from mindformers_glm32k.dryrun.analysis.analyze import TERMS
from mindformers_glm32k.dryrun.analysis.extrapolate import LAYERS
from mindformers_glm32k.dryrun.search.figures import PHASES, combine, program_of, settled
from mindformers_glm32k.dryrun.search.model import Dims, Model
from mindformers_glm32k.dryrun.search.search import MINUTES, Search
from mindformers_glm32k.dryrun.search.space import HARDER
from mindformers_glm32k.errors import InputError

GIB = 2**30
STATES = {"parameter": "weights", "accumulator": "gradients", "optimizer": "optimizer"}


def card():
    """The card's YAML."""
    return yaml.safe_load(CONFIG.read_text(encoding="utf-8"))


def program(figures, stage):
    """A program as `analysis.analyze` gives it, of those figures."""
    found = program_of(figures, stage)
    sizes = {order: figures["bytes", order] for order in ("bfs", "dfs")}
    for item in found["collectives"]:
        item["purpose"] = "parallel_optimizer_allgather" if item["once"] else "redistribution"
    return {
        **found,
        "total_bytes_by_order": sizes,
        "total_bytes": sizes["dfs"],
        "activation_peak_bytes": sizes["dfs"] - figures["states",],
        **{f"{name}_bytes": figures[key,] for name, key in STATES.items()},
        "at_peak_by_order": {order: _at_peak(figures, order) for order in sizes},
    }


def _at_peak(figures, order):
    phases = {name: figures[name, order] - figures["states",] for name in PHASES}
    return {**phases, **{name: figures[name, order] for name in TERMS}}


class Invented:
    """Stands where the search has Programs.

    Args:
        dims: sizes of the model.
        memory, vector: factors on the closed form.
        broken: settings that do not compile, by a test of theirs.
        loss: whether the loss is part of the peak.
    """

    def __init__(self, dims, memory=1.2, vector=1.5, broken=lambda setting: False, loss=True):
        self.form, self.memory, self.vector, self.broken = Model(dims), memory, vector, broken
        self.loss = loss
        self.asked: list[str] = []

    def figures(self, setting, stage, layers):
        """What is true."""
        found = self.form.closed_form(setting, stage, layers)
        found["vector",] *= self.vector
        if not self.loss:
            for order in ("bfs", "dfs"):
                found["passes", order] -= found["logits", order]
                found["logits", order] = 0
        activations = found["passes", "bfs"] - found["states",]
        found["passes", "bfs"] = found["states",] + self.memory * activations
        found["passes", "dfs"] = found["states",] + (self.memory + 0.05) * activations
        return settled(found)

    def of(self, setting, layers=None):
        """Programs of every stage, with their own layers or `layers`."""
        found, plain = [], replace(setting, layers=(), recomputed=())
        for stage, count in enumerate(setting.layers):
            more = setting.recomputed[stage] if setting.recomputed else 0
            figures = self.figures(plain, stage, (layers or count) - more)
            if more:
                harder = replace(plain, recompute=HARDER[plain.recompute])
                ends = [self.figures(harder, stage, one) for one in (more, 0)]
                figures = settled(combine((1, figures), (1, ends[0]), (-1, ends[1])))
            found.append(program(figures, stage))
        return found


def search(devices=8, limit=56, rows=16, config=None, minutes=MINUTES, **factors):
    """A search over invented programs, and these."""
    config = config or card()
    made = Search(config, config, devices, limit * GIB, rows, None, minutes)
    invented = Invented(made.dims, **factors)

    def shallow(setting):
        invented.asked.append(setting.name)
        if invented.broken(setting):
            raise InputError("model_config.something: cannot work")
        return [invented.of(setting, layers) for layers in LAYERS]

    def full(setting):
        invented.asked.append(f"full {setting.name}")
        return invented.of(setting)

    made._config = lambda setting, order=None: setting  # in place of the configuration that asks for it
    made.programs.shallow, made.programs.full = shallow, full
    return made, invented


__all__ = ["GIB", "Dims", "Invented", "card", "program", "search"]

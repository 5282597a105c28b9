"""Rehearsal: the programs of all ranks compiled and executed on this machine, beside that of one device."""
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_glm32k.dryrun import shrink
from mindformers_glm32k.dryrun.execution import states
from mindformers_glm32k.dryrun.execution.interpreter import Machine
from mindformers_glm32k.dryrun.execution.network import Network
from mindformers_glm32k.dryrun.execution.world import run_world
from mindformers_glm32k.dryrun.layout import layout_of
from mindformers_glm32k.dryrun.mindir import read_program
from mindformers_glm32k.dryrun.strategy import strategy_file
from mindformers_glm32k.dryrun.worker import STATE_FILE
from mindformers_glm32k.dryrun.workers import read_layout, read_rows, run_workers
from mindformers_glm32k.weights.shards import read_strategy

LARGEST_LENGTH = 2048  # positions that are executed as they are
_JOBS = 2


@dataclass
class Rehearsed:
    """A program that is ready to be executed.

    Args:
        program (Program): compiled.
        state (dict[str, numpy.ndarray]): initial values that its process left.
        layouts (dict[str, ParameterLayout]): of its stage; {} for one device.
        trainable (list[str]): names of what is trained.
        inputs (list[list[int]]): shapes of the inputs that it was compiled for.
    """

    program: object
    state: dict
    layouts: dict
    trainable: list
    inputs: list


def compile_all(launcher_arguments, layout, work, ranks=None):
    """Compiles programs and reads what their processes left.

    Args:
        launcher_arguments (list[str]): run_mindformer's.
        layout (Layout): of the configuration.
        work (pathlib.Path): folder for logs and intermediate files.
        ranks (list[int] | None): all by default.

    Returns:
        list[Rehearsed]: by rank.
    """
    ranks = list(range(layout.world)) if ranks is None else ranks
    found = {}

    def gather(compiled):
        entry = compiled.record["programs"][-1]
        strategy = strategy_file(compiled.folder, compiled.rank)
        found[compiled.rank] = Rehearsed(
            read_program(compiled.folder / entry["file"]), dict(np.load(compiled.folder / STATE_FILE)),
            read_strategy(strategy) if strategy.exists() else {}, compiled.record["trainable"],
            compiled.record["inputs"])
        shutil.copytree(compiled.folder / "output" / "strategy", work / "strategy", dirs_exist_ok=True)
        shutil.rmtree(compiled.folder)

    (work / "strategy").mkdir(parents=True, exist_ok=True)
    run_workers(ranks, layout, work, launcher_arguments, on_done=gather, jobs=_JOBS, to_execute=True)
    return [found[rank] for rank in ranks]

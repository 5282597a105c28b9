"""Runs compiled programs in NumPy: one interpreter and thread a rank, collectives between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindformers_glm32k.lazy import face

_FACE = {"NetworkError": "network", "SimulationError": "interpreter", "summary": "report"}
__all__ = sorted([*_FACE, "simulate"])
__getattr__ = face(__name__, _FACE)


def simulate(
    config_file: str,
    overrides: list[str],
    output: Path,
    steps: int,
    load_checkpoint: str | None = None,
    scaled_down: bool | None = None,
    precision: str = "float32",
    traces: Sequence[str] = (),
) -> dict:
    """Compiles the programs of all ranks and of one device, runs them on the same inputs, compares, and writes
    execution.json and execution.md; of training also the strategy files and each rank's checkpoint.

    Arguments are the fields of `scale_down.Request`.

    Returns:
        execution.json; "agrees" says whether the layout computes what one device computes.

    Raises:
        InputError: the configuration cannot be simulated.
        SimulationError, NetworkError: the programs cannot be run to the end.
        WorkerFailed: a program was not compiled.
    """
    from mindformers_glm32k.dryrun.compile.pool import read_layout
    from mindformers_glm32k.dryrun.simulator import generate, scale_down, train

    _, config = read_layout(["--config", str(Path(config_file).resolve()), *overrides])
    mode = generate if scale_down.predicts(config) else train
    request = scale_down.Request(config_file, overrides, output, steps, load_checkpoint, scaled_down, precision, traces)
    return mode.simulate(request, config)

"""The fastest layout that fits a number of NPUs and their memory, found by compiling few programs."""

from __future__ import annotations

from pathlib import Path

from mindformers_glm32k.checks import is_int
from mindformers_glm32k.dryrun.compile.pool import read_config
from mindformers_glm32k.dryrun.report.advice import GIB
from mindformers_glm32k.dryrun.search.predict import search_prompts
from mindformers_glm32k.dryrun.search.results import Candidate, misfit, write
from mindformers_glm32k.dryrun.search.search import MINUTES, Search
from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.run_mindformer import read_as_written

__all__ = ["Candidate", "search_layouts"]


def search_layouts(
    config_file: str,
    overrides: list[str],
    output: Path,
    devices: int,
    memory_gib: float,
    rows: int,
    quick: bool = False,
    minutes: float = MINUTES,
) -> tuple[list[Candidate], str]:
    """Searches and writes search.json, the candidates' YAMLs, search.md and search.png.

    Args:
        config_file: YAML; its model, sequence length and training settings are kept.
        overrides: run_mindformer's other options.
        output: where the files go.
        devices: NPUs.
        memory_gib: limit of a card's memory, GiB.
        rows: most sequences of a step, over all NPUs.
        quick: nothing is compiled at full depth.
        minutes: after which no compile of training starts.

    Returns:
        The candidates that fit, best first, and the table.

    Raises:
        InputError: a size that is not positive, or a configuration that run_mindformer would refuse.
        CommandFailed: nothing fits; the files are written all the same.
    """
    for name, value in (("devices", devices), ("rows", rows)):
        if not is_int(value, 1):
            raise InputError(f"--{name} {value}: a whole number of at least 1 is needed")
    for name, value, unit in (("memory", memory_gib, "GiB"), ("minutes", minutes, "minutes")):
        if not value > 0:
            raise InputError(f"--{name} {value}: a number of {unit} above 0 is needed")
    arguments = ["--config", str(Path(config_file).resolve()), *overrides]
    _, written = read_as_written(arguments)
    merged = read_config(arguments)
    limit = memory_gib * GIB
    output.mkdir(parents=True, exist_ok=True)
    if str(written["run_mode"]).startswith("predict"):
        found = search_prompts(written, merged, devices, limit, output)
    else:
        found = Search(written, merged, devices, limit, rows, output, minutes).run(quick)
    text = write(found, written, limit, output, config_file)
    fitting = [item for item in found if item.bytes <= limit]
    if not fitting:
        raise CommandFailed(misfit(found, limit, output))
    return fitting, text

"""The fastest layout that fits a number of NPUs and their memory, found by compiling few programs."""

from __future__ import annotations

from pathlib import Path

from mindformers_glm32k.checks import is_int
from mindformers_glm32k.dryrun.compile.pool import read_config
from mindformers_glm32k.dryrun.report.advice import GIB
from mindformers_glm32k.dryrun.search.predict import search_prompts
from mindformers_glm32k.dryrun.search.results import Candidate, write
from mindformers_glm32k.dryrun.search.search import Search
from mindformers_glm32k.errors import InputError
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
) -> tuple[list[Candidate], str]:
    """Searches and writes search.json, the candidates' YAMLs, search.md and search.png.

    Args:
        config_file: YAML, whose model, sequence length and training are kept.
        overrides: run_mindformer's other options.
        output: where the files go.
        devices: NPUs.
        memory_gib: that a card may take.
        rows: sequences of a step at most, over all NPUs.
        quick: nothing is compiled at full depth.

    Returns:
        The candidates that fit, best first, and the table. Nothing fits where there are none.

    Raises:
        InputError: sizes that are none, or a configuration that run_mindformer would refuse.
    """
    for name, value in (("devices", devices), ("rows", rows)):
        if not is_int(value, 1):
            raise InputError(f"--{name} {value}: a whole number of at least 1 is needed")
    if not memory_gib > 0:
        raise InputError(f"--memory {memory_gib}: a number of GiB above 0 is needed")
    arguments = ["--config", str(Path(config_file).resolve()), *overrides]
    _, written = read_as_written(arguments)
    merged = read_config(arguments)
    limit = memory_gib * GIB
    output.mkdir(parents=True, exist_ok=True)
    if str(written["run_mode"]).startswith("predict"):
        found = search_prompts(written, merged, devices, limit, output)
    else:
        found = Search(written, merged, devices, limit, rows, output).run(quick)
    text = write(found, written, limit, output, config_file)
    return [item for item in found if item.bytes <= limit], text

"""A dry run: compiles the programs of a layout, analyzes them and writes the report."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from mindformers_glm32k.dryrun.analysis.analyze import analyze
from mindformers_glm32k.dryrun.analysis.extrapolate import LAYERS, extrapolate, layers_of_stages, overrides_for
from mindformers_glm32k.dryrun.compile.pool import Compiled, read_layout, run_workers
from mindformers_glm32k.dryrun.report import write_report
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import copy_atomically
from mindformers_glm32k.parallel import ParallelLayout, virtual_stages


def dry_run(
    config_file: str,
    overrides: list[str],
    output: Path,
    rank: str = "stages",
    keep_programs: bool = False,
    extrapolated: bool = False,
    devices: int | None = None,
) -> dict:
    """Compiles the programs of a configuration and writes the report.

    Args:
        config_file: YAML.
        overrides: run_mindformer's other options.
        output: folder of the report, strategy files, logs and programs.
        rank: the ranks to compile, see `ranks_asked_for`.
        keep_programs: whether the MindIR files are kept.
        extrapolated: compile few layers a stage, extrapolate to all.
        devices: NPUs of the run; a layout of another size is refused.

    Returns:
        The report, as written to report.json.
    """
    launcher_arguments = ["--config", str(Path(config_file).resolve()), *overrides]
    layout, config = read_layout(launcher_arguments, devices)
    ranks = ranks_asked_for(rank, layout)
    if extrapolated:
        programs = compile_shallow(config, ranks, layout, output, launcher_arguments)
    else:
        programs = compile_and_analyze(ranks, layout, output, launcher_arguments, keep_programs)
    sizes = asdict(layout)
    sizes["rows"] = sizes.pop("global_batch_size")  # report.json's name
    sizes["interleave"] = virtual_stages(config) if layout.stages > 1 else 1
    report = {
        "world_size": layout.world,
        "layout": layout.describe(),
        "layout_sizes": sizes,
        "tokens_per_step": layout.tokens_per_step,
        "run_mode": config["run_mode"],
        "config": config_file,
        "programs": programs,
    }
    write_report(report, config, output)
    return report


def ranks_asked_for(text: str, layout: ParallelLayout) -> list[int]:
    """The ranks that `--rank` selects: "stages" (the first rank of each stage), "all" or one rank.

    Raises:
        InputError: another text, or a rank outside of the layout.
    """
    if text == "all":
        return list(range(layout.world))
    if text == "stages":
        return [layout.ranks_of(stage)[0] for stage in range(layout.stages)]
    if not text.isdigit() or int(text) >= layout.world:
        raise InputError(
            f"--rank {text}: this layout ({layout.describe()}) has ranks 0 to {layout.world - 1}; "
            "'stages' and 'all' are understood too"
        )
    return [int(text)]


def compile_shallow(
    config: dict, ranks: list[int], layout: ParallelLayout, output: Path, launcher_arguments: list[str]
) -> list[dict]:
    """`compile_and_analyze`, extrapolated from programs of LAYERS layers a stage; a layout with no more layers than
    that is compiled in full.

    Raises:
        InputError: the configuration does not allow it, see `layers_of_stages`.
    """
    layers = layers_of_stages(config)
    if max(layers) <= LAYERS[1]:
        return compile_and_analyze(ranks, layout, output, launcher_arguments)
    compiled = []
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as work:
        for few in LAYERS:
            shallow = replace(layout, layers=few * layout.stages)
            arguments = [*launcher_arguments, *overrides_for(few, layout.stages)]
            compiled.append(compile_and_analyze(ranks, shallow, Path(work) / str(few), arguments))
    return [extrapolate(*pair, layers[pair[0]["stage"]]) for pair in zip(*compiled)]


def compile_and_analyze(
    ranks: list[int], layout: ParallelLayout, output: Path, launcher_arguments: list[str], keep_programs: bool = False
) -> list[dict]:
    """Compiles and analyzes the programs of `ranks`; saves strategy files, logs and (`keep_programs`) MindIR files in
    `strategy/`, `log/` and `programs/` below the output.

    Returns:
        One entry per rank, two (prefill, increment) for prediction with a cache; see `analysis.analyze`.
    """
    programs = []
    output.mkdir(parents=True, exist_ok=True)

    def gather(compiled: Compiled) -> None:
        record, folder, rank = compiled.record, compiled.folder, compiled.rank
        for strategy in (folder / "output" / "strategy").glob("ckpt_strategy_rank_*.ckpt"):
            copy_atomically(strategy, output / "strategy" / strategy.name)
        for entry in record["programs"]:
            program = analyze(
                folder / entry["file"], folder / "text", rank, layout.stage_of(rank), layout.lengths, layout.widths
            )
            programs.append(
                {
                    "rank": program.pop("rank"),
                    "stage": program.pop("stage"),
                    "phase": entry["phase"],
                    "compile_seconds": entry["compile_seconds"],
                    "peak_rss_bytes": record["peak_rss_bytes"],
                    **program,
                    "stand_ins": record["stand_ins"],
                    "inputs": record.get("inputs"),
                }
            )
            if keep_programs:
                name = f"rank_{rank}{'' if entry['phase'] == 'train' else '_' + entry['phase']}.mindir"
                copy_atomically(folder / entry["file"], output / "programs" / name)
        shutil.rmtree(folder)

    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as work:
        try:
            run_workers(ranks, layout, Path(work).resolve(), launcher_arguments, on_done=gather)
        finally:
            for log in Path(work).glob("log_rank_*.txt"):
                copy_atomically(log, output / "log" / log.name)
    return programs

"""Compile the program of every NPU on this machine and report its memory, traffic and work."""

import argparse
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.files import copy_atomically

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's


def add_arguments(parser):
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="YAML of the run, as for run_mindformer")
    what.add_argument(
        "--compare",
        nargs="+",
        metavar="YAML_OR_FOLDER",
        help="several layouts side by side, with an estimate of their speed: YAMLs, or output folders of dry runs",
    )
    parser.add_argument(
        "--rank",
        default="stages",
        help="whose program: 'stages' (default: one rank per pipeline stage), 'all', or a number",
    )
    parser.add_argument("--devices", type=int, help="NPUs of the run; a layout of another size is refused")
    parser.add_argument("--output_dir", default="./dryrun", help="folder of the report (default ./dryrun)")
    parser.add_argument(
        "--keep_programs", action="store_true", help="keep each program (MindIR) in OUTPUT_DIR/programs"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile 2 and 4 layers per stage and extrapolate to all layers; no strategy files",
    )
    rehearsal = parser.add_argument_group("rehearsal (--execute)")
    rehearsal.add_argument(
        "--execute",
        type=int,
        metavar="STEPS",
        help="execute the programs of all ranks for so many optimizer steps, and compare losses, "
        "gradient norms and weights with one device's; of prediction, decode so many tokens and "
        "compare them and their logits; exit status 1 when they differ",
    )
    rehearsal.add_argument("--load_checkpoint", help="whole checkpoint to start from (default: random weights)")
    rehearsal.add_argument(
        "--shrink",
        action=argparse.BooleanOptionalAction,
        help="make model and rows small, the layout as it is (default: where they are large)",
    )
    rehearsal.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16", "config"),
        default="float32",
        help="dtype of all that is computed; config: as in the YAML (default float32)",
    )
    rehearsal.add_argument(
        "--trace",
        action="append",
        default=[],
        metavar="NAME",
        help="print the values of an operator, a scope or a parameter on all ranks",
    )
    parser.epilog = "Any other option is run_mindformer's: --run_mode predict, --parallel_config.data_parallel 4, …"


def run(args):
    output = Path(args.output_dir)
    _refuse_contradictions(args)
    if args.compare:
        from mindformers_glm32k.dryrun.report.compare import compare

        print(
            compare(
                args.compare,
                output,
                lambda config, folder: make_report(
                    config, args.overrides, folder, keep_programs=args.keep_programs, quick=args.quick
                ),
            )
        )
        return 0
    if args.execute is not None:
        return _execute(args, output)
    make_report(args.config, args.overrides, output, args.rank, args.keep_programs, args.quick, args.devices)
    print(f"report: {output / 'report.md'} (figures: report.json)")
    return 0


def _refuse_contradictions(args):
    """Options that say nothing together."""
    pairs = [
        ("quick", "keep_programs", "programs of few layers are not those of the run"),
        ("execute", "compare", "one layout is executed at a time"),
        ("execute", "quick", "what is executed has all its layers; --shrink makes it small"),
        ("execute", "keep_programs", "small programs are not those of the run"),
    ]
    for first, second, why in pairs:
        if getattr(args, first) not in (None, False) and getattr(args, second):
            raise InputError(f"--{first} and --{second} do not go together: {why}")


def _execute(args, output):
    """The simulation; returns the exit status."""
    from mindformers_glm32k.dryrun.simulator import NetworkError, SimulationError, simulate, summary

    if args.execute < 1:
        raise InputError(f"--execute {args.execute}: at least one step is needed")
    try:
        report = simulate(
            args.config,
            args.overrides,
            output,
            args.execute,
            args.load_checkpoint,
            args.shrink,
            args.precision,
            args.trace,
        )
    except (SimulationError, NetworkError) as error:
        raise CommandFailed(f"the programs cannot be simulated: {error}") from error
    print(summary(report))
    print(f"report: {output / 'execution.md'} (figures: execution.json)")
    return 0 if report["agrees"] else 1


def make_report(config_file, overrides, output, rank="stages", keep_programs=False, quick=False, devices=None):
    """Compiles the programs of a configuration and writes the report.

    Args:
        config_file (str): YAML.
        overrides (list[str]): run_mindformer's other options.
        output (pathlib.Path): the report and what belongs to it go there.
        rank (str): whose programs, see `ranks_asked_for`.
        keep_programs (bool): whether the MindIR files are kept.
        quick (bool): compile few layers and extrapolate.
        devices (int | None): NPUs of the run; a layout of another size is refused.

    Returns:
        dict: the report.
    """
    from mindformers_glm32k.dryrun.compile.pool import read_layout
    from mindformers_glm32k.dryrun.report.markdown import write_report

    launcher_arguments = ["--config", str(Path(config_file).resolve()), *overrides]
    layout, config = read_layout(launcher_arguments, devices)
    ranks = ranks_asked_for(rank, layout)
    if quick:
        programs = compile_shallow(config, ranks, layout, output, launcher_arguments)
    else:
        programs = compile_and_analyze(ranks, layout, output, launcher_arguments, keep_programs)
    report = {
        "world_size": layout.world,
        "layout": layout.describe(),
        "layout_sizes": asdict(layout),
        "tokens_per_step": layout.tokens_per_step,
        "run_mode": config["run_mode"],
        "config": config_file,
        "programs": programs,
    }
    write_report(report, config, output)
    return report


def compile_shallow(config, ranks, layout, output, launcher_arguments):
    """Like `compile_and_analyze`, extrapolated from programs of few layers; stages that have no more are compiled as
    they are.

    Raises:
        InputError: the configuration does not allow it, see `quick.layers_of_stages`.
    """
    from mindformers_glm32k.dryrun.analysis import extrapolate as quick

    layers = quick.layers_of_stages(config)
    if max(layers) <= quick.LAYERS[1]:
        return compile_and_analyze(ranks, layout, output, launcher_arguments)
    compiled = []
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as work:
        for few in quick.LAYERS:
            shallow = replace(layout, layers=few * layout.stages)
            arguments = [*launcher_arguments, *quick.overrides_for(few, layout.stages)]
            compiled.append(compile_and_analyze(ranks, shallow, Path(work) / str(few), arguments))
    return [quick.extrapolate(*pair, layers[pair[0]["stage"]]) for pair in zip(*compiled)]


def ranks_asked_for(text, layout):
    """The ranks that `--rank` means.

    Args:
        text (str): "stages", "all" or a number.
        layout (Layout): of the configuration.

    Returns:
        list[int]

    Raises:
        InputError: neither, or no such rank.
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


def compile_and_analyze(ranks, layout, output, launcher_arguments, keep_programs=False):
    """Compiles programs, saves their strategy files, and reads them.

    Args:
        ranks (list[int]): whose.
        layout (Layout): of the configuration.
        output (pathlib.Path): strategy files go to `strategy/`, logs to `log/`, programs to `programs/` below it.
        launcher_arguments (list[str]): run_mindformer's.
        keep_programs (bool): whether the MindIR files are kept.

    Returns:
        list[dict]: one per rank, of prediction with a cache two (prefill, increment); see `analysis.analyze`.
    """
    from mindformers_glm32k.dryrun.analysis.analyze import analyze
    from mindformers_glm32k.dryrun.compile.pool import run_workers

    programs = []
    output.mkdir(parents=True, exist_ok=True)

    def gather(compiled):
        record, folder = compiled.record, compiled.folder
        for strategy in (folder / "output" / "strategy").glob("ckpt_strategy_rank_*.ckpt"):
            copy_atomically(strategy, output / "strategy" / strategy.name)
        for entry in record["programs"]:
            program = analyze(
                folder / entry["file"],
                folder / "text",
                compiled.rank,
                layout.stage_of(compiled.rank),
                layout.lengths,
                layout.widths,
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
                name = f"rank_{compiled.rank}{'' if entry['phase'] == 'train' else '_' + entry['phase']}.mindir"
                copy_atomically(folder / entry["file"], output / "programs" / name)
        shutil.rmtree(folder)

    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as work:
        try:
            run_workers(ranks, layout, Path(work).resolve(), launcher_arguments, on_done=gather)
        finally:
            for log in Path(work).glob("log_rank_*.txt"):
                copy_atomically(log, output / "log" / log.name)
    return programs


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k dryrun"))

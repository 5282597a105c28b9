"""Compile the program of every NPU on this machine and report its memory, traffic and work."""
import json
import shutil
import sys
import tempfile
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's


def add_arguments(parser):
    parser.add_argument("--config", required=True, help="YAML of the run, as for run_mindformer")
    parser.add_argument("--rank", default="stages",
                        help="whose program: 'stages' (default: one rank per pipeline stage), 'all', or a number")
    parser.add_argument("--output_dir", default="./dryrun", help="folder of the report (default ./dryrun)")
    parser.add_argument("--keep_programs", action="store_true", help="keep each program (MindIR) in OUTPUT_DIR/programs")
    parser.epilog = "Any other option is run_mindformer's: --run_mode predict, --parallel_config.data_parallel 4, …"


def run(args):
    from mindformers_glm32k.dryrun.layout import layout_of
    from mindformers_glm32k.dryrun.workers import WorkerFailed, read_config

    launcher_arguments = ["--config", str(Path(args.config).resolve()), *args.overrides]
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as work:
            config = read_config(launcher_arguments, Path(work).resolve())
        layout = layout_of(config)
        ranks = ranks_asked_for(args.rank, layout)
        programs = compile_and_analyze(ranks, layout, output, launcher_arguments, args.keep_programs)
    except WorkerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = {"world_size": layout.world, "layout": layout.describe(), "config": args.config, "programs": programs}
    with atomic_path(output / "report.json") as path:
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"report: {output / 'report.json'}")
    return 0


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
        raise InputError(f"--rank {text}: this layout ({layout.describe()}) has ranks 0 to {layout.world - 1}; "
                         "'stages' and 'all' are understood too")
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
        list[dict]: one per rank, see `analysis.analyze`.
    """
    from mindformers_glm32k.dryrun.analysis import analyze
    from mindformers_glm32k.dryrun.worker import PROGRAM_FILE
    from mindformers_glm32k.dryrun.workers import run_workers

    programs = []
    output.mkdir(parents=True, exist_ok=True)

    def gather(compiled):
        record, folder = compiled.record, compiled.folder
        for strategy in (folder / "output" / "strategy").glob("ckpt_strategy_rank_*.ckpt"):
            copy_atomically(strategy, output / "strategy" / strategy.name)
        program = analyze(folder / PROGRAM_FILE, folder / "text", compiled.rank, layout.stage_of(compiled.rank))
        programs.append({"rank": compiled.rank, "stage": program.pop("stage"),
                         "compile_seconds": record["compile_seconds"], "peak_rss_bytes": record["peak_rss_bytes"],
                         **{key: value for key, value in program.items() if key != "rank"},
                         "stand_ins": record["stand_ins"], "inputs": record.get("inputs")})
        if keep_programs:
            copy_atomically(folder / PROGRAM_FILE, output / "programs" / f"rank_{compiled.rank}.mindir")
        shutil.rmtree(folder)

    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as work:
        try:
            run_workers(ranks, layout, Path(work).resolve(), launcher_arguments, on_done=gather)
        finally:
            for log in Path(work).glob("log_rank_*.txt"):
                copy_atomically(log, output / "log" / log.name)
    return programs


def copy_atomically(source, target):
    """Copies a file so that `target` is never half written."""
    with atomic_path(target) as path:
        shutil.copyfile(source, path)


if __name__ == "__main__":
    from mindformers_glm32k.cli import run_command
    sys.exit(run_command(sys.modules[__name__], "glm32k dryrun"))

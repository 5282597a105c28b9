"""Compile the program of every NPU on this machine and report its memory, traffic and work."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_glm32k.commands import run_command
from mindformers_glm32k.errors import CommandFailed, InputError

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    search = parser.add_argument_group("search (--search)")
    search.add_argument(
        "--search",
        action="store_true",
        help="find the fastest layouts of --devices NPUs that fit --memory: OUTPUT_DIR/search.json, a table, a "
        "picture, and a YAML for each; with --quick nothing is compiled at full depth",
    )
    search.add_argument(
        "--memory", type=float, default=56, metavar="GIB", help="GiB that a card may take (default 56 of 64)"
    )
    search.add_argument(
        "--rows", type=int, default=16, metavar="N", help="sequences of a step at most, over all NPUs (default 16)"
    )
    search.add_argument(
        "--minutes", type=float, default=20, metavar="N", help="in which a compile may begin (default 20)"
    )
    simulation = parser.add_argument_group("simulation (--execute)")
    simulation.add_argument(
        "--execute",
        type=int,
        metavar="STEPS",
        help="simulate the programs of all ranks for so many optimizer steps, and compare losses, "
        "gradient norms and weights with one device's; of prediction, decode so many tokens and "
        "compare them and their logits; exit status 1 when they differ",
    )
    simulation.add_argument("--load_checkpoint", help="whole checkpoint to start from (default: random weights)")
    simulation.add_argument(
        "--shrink",
        action=argparse.BooleanOptionalAction,
        help="make model and data small, the layout as it is (default: where they are large)",
    )
    simulation.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16", "config"),
        default="float32",
        help="dtype of all that is computed; config: as in the YAML (default float32)",
    )
    simulation.add_argument(
        "--trace",
        action="append",
        default=[],
        metavar="NAME",
        help="print the values of an operator, a scope or a parameter on all ranks",
    )
    parser.epilog = "Any other option is run_mindformer's: --run_mode predict, --parallel_config.data_parallel 4, …"


def run(args: argparse.Namespace) -> int:
    output = Path(args.output_dir)
    _refuse_contradictions(args)
    if args.execute is not None:
        return _execute(args, output)
    if args.search:
        return _search(args, output)
    from mindformers_glm32k.dryrun import compare, dry_run

    if args.compare:

        def make_report(config, folder):
            return dry_run(config, args.overrides, folder, keep_programs=args.keep_programs, extrapolated=args.quick)

        print(compare(args.compare, output, make_report))
        return 0
    dry_run(args.config, args.overrides, output, args.rank, args.keep_programs, args.quick, args.devices)
    print(f"report: {output / 'report.md'} (figures: report.json)")
    return 0


def _refuse_contradictions(args):
    """Options that say nothing together."""
    pairs = [
        ("quick", "keep_programs", "programs of few layers are not those of the run"),
        ("execute", "compare", "one layout is simulated at a time"),
        ("execute", "quick", "what is simulated has all its layers; --shrink makes it small"),
        ("execute", "keep_programs", "small programs are not those of the run"),
        ("search", "execute", "simulate a candidate's YAML afterwards"),
        ("search", "compare", "a search starts from one YAML"),
        ("search", "keep_programs", "dry-run a candidate's YAML for its programs"),
    ]
    for first, second, why in pairs:
        if getattr(args, first) not in (None, False) and getattr(args, second):
            raise InputError(f"--{first} and --{second} do not go together: {why}")


def _search(args, output):
    """The search for layouts; returns the exit status."""
    from mindformers_glm32k.dryrun import search_layouts

    if args.devices is None:
        raise InputError("--search: the number of NPUs is needed: --devices N")
    _, text = search_layouts(
        args.config, args.overrides, output, args.devices, args.memory, args.rows, args.quick, args.minutes
    )
    print(text)
    print(f"candidates: {output / 'search.json'} (table: search.md, picture: search.png)")
    return 0


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


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], "glm32k dryrun"))

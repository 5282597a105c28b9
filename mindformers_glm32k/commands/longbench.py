"""LongBench: predict its samples, score the answers as its eval.py does, report them beside other runs."""

from __future__ import annotations

import argparse
import sys

from mindformers_glm32k.errors import InputError

_EXAMPLES = """examples (glm32k longbench ACTION --help lists the options):
  glm32k longbench score --predictions OUT --data data.zip
  glm32k longbench report --predictions OUT --compare base=OTHER_OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their options."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    score = actions.add_parser("score", help="score predictions as LongBench's eval.py does; writes scores.json")
    _scoring(score)

    report = actions.add_parser("report", help="write report.html and report.md: scores beside published ones and runs")
    _scoring(report)
    _reporting(report)


def _scoring(parser):
    parser.add_argument("--predictions", required=True, help="folder of DATASET.jsonl, as predict or pred.py writes it")
    parser.add_argument("--data", help="LongBench's folder or zip: tells which rows are missing")
    parser.add_argument(
        "--manifest", help="of `glm32k preprocess` (ROWS.manifest.json): rows that were trained on are flagged"
    )
    parser.add_argument("--exclude_trained", action="store_true", help="leave the rows that were trained on out")


def _reporting(parser):
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="another run's predictions, to show beside; may be given several times",
    )
    parser.add_argument("--name", help="what to call this run. Default: the folder's name")
    parser.add_argument("--report_dir", help="folder of report.html and report.md. Default: that of the predictions")


def run(args: argparse.Namespace) -> int:
    """Runs the action; returns the exit status."""
    return {"score": _score, "report": _report}[args.action](args)


def _scored(args, folder):
    from mindformers_glm32k.data.holdout import Manifest
    from mindformers_glm32k.longbench import samples
    from mindformers_glm32k.longbench.score import score_folder

    if args.exclude_trained and not args.manifest:
        raise InputError("--exclude_trained: --manifest is needed, which says what was trained on")
    if args.expected is None and args.data:
        args.expected = samples.counts(samples.scan(args.data))
    manifest = Manifest.read(args.manifest) if args.manifest else None
    return score_folder(folder, args.expected, manifest, args.exclude_trained)


def _score(args):
    from mindformers_glm32k.longbench import tables

    args.expected = None
    scores = _scored(args, args.predictions)
    path = scores.write()
    print(tables.text(scores))
    for line in scores.warnings():
        print(line, file=sys.stderr)
    print(f"scores: {path}")
    return 0


def _report(args):
    from pathlib import Path

    from mindformers_glm32k.longbench.report import write_report

    args.expected = None
    named = {args.name or _name(args.predictions): args.predictions}
    for text in args.compare:
        name, equals, folder = text.partition("=")
        name, folder = (name, folder) if equals else (_name(text), text)
        if name in named:
            raise InputError(f"--compare {text}: two runs are called {name!r}; write NAME={folder}")
        named[name] = folder
    runs = {name: _scored(args, folder) for name, folder in named.items()}
    for name, scores in runs.items():
        for line in scores.warnings():
            print(f"{name}: {line}", file=sys.stderr)
    html, markdown = write_report(runs, Path(args.report_dir or args.predictions))
    print(f"report: {html}\n        {markdown}")
    return 0


def _name(folder):
    from pathlib import Path

    return Path(folder).resolve().name


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k longbench"))

"""Say all that is wrong with a run before it starts: YAML, data, checkpoint, layout; mend the YAML."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from mindformers_glm32k.commands import run_command
from mindformers_glm32k.errors import InputError

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's
_HEADER = "# {name} as mended by `glm32k check --fix`; comments are in the original. What was changed:\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML of the run, as for run_mindformer")
    parser.add_argument("--json", action="store_true", help='print {"findings": [{severity, key, message, fix}]}')
    parser.add_argument(
        "--fix",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the YAML with what is certain mended to FILE (default NAME_fixed.yaml beside it), never over one",
    )
    parser.add_argument("--deep", action="store_true", help="compile the program of every NPU, too: a dry run")
    parser.epilog = (
        "Any other option is run_mindformer's: --train_dataset_dir FILE, --runner_config.epochs 3, … Exit status 1 "
        "where anything is an error."
    )


def run(args: argparse.Namespace) -> int:
    words = ["--config", args.config, *args.overrides]
    with contextlib.redirect_stdout(sys.stderr):  # MindFormers logs to the standard output
        from mindformers_glm32k import run_mindformer
        from mindformers_glm32k.preflight import all_findings, mended

        written, config = run_mindformer.read_as_written(words)
        found = all_findings(config, config["run_mode"])
        lines = target = None
        if args.fix is not None:
            fixed, lines = mended(written, config["run_mode"])
            target = _write(args, fixed, lines) if lines else None
    failed = any(finding.severity == "error" for finding in found)
    if args.json:
        print(json.dumps({"findings": [finding.as_json() for finding in found]}, ensure_ascii=False, indent=1))
    else:
        for finding in found:
            print(f"{finding.severity}: {finding.line()}")
        counts = [(sum(one.severity == name for one in found), name) for name in ("error", "warning", "note")]
        print(", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts))
        for line in lines or ():
            print(f"mended: {line}")
    if args.fix is not None:
        said = f"wrote {target}; check it, too" if target else "--fix: nothing is certain to be mended, no file written"
        print(said, file=sys.stderr if args.json else sys.stdout)
    if args.deep and not failed:
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            return _dry_run(words)
    return 1 if failed else 0


def _write(args, config, lines):
    import yaml

    from mindformers_glm32k.files import atomic_path

    source = Path(args.config)
    target = Path(args.fix) if args.fix else source.with_name(f"{source.stem}_fixed.yaml")
    if target.exists():
        raise InputError(f"--fix {target}: is there already; remove it or name another file: --fix FILE")
    header = _HEADER.format(name=source.name) + "".join(f"#   {' '.join(line.split())}\n" for line in lines)
    with atomic_path(target) as temporary:
        temporary.write_text(header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return target


def _dry_run(words):
    from mindformers_glm32k.commands import dryrun

    parser = argparse.ArgumentParser(prog="glm32k check --deep", allow_abbrev=False)
    dryrun.add_arguments(parser)
    args, args.overrides = parser.parse_known_args(words)
    return dryrun.run(args)


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], "glm32k check"))

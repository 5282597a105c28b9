"""Write the parallel strategy files of all NPUs of a layout, without an NPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_glm32k.commands import run_command

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML of the run, as for run_mindformer")
    parser.add_argument("--output", required=True, help="folder of the files ckpt_strategy_rank_N.ckpt")
    parser.add_argument("--devices", type=int, help="NPUs of the run; a layout of another size is refused")
    parser.epilog = (
        "Any other option is run_mindformer's. The files are what --src_ckpt_strategy and "
        "--dst_ckpt_strategy of `python -m mindformers.tools.transform_ckpt` take."
    )


def run(args: argparse.Namespace) -> int:
    from mindformers_glm32k.dryrun.compile.pool import has_adapters, read_layout, write_strategies

    launcher_arguments = ["--config", str(Path(args.config).resolve()), *args.overrides]
    layout, config = read_layout(launcher_arguments, args.devices)
    written = write_strategies(layout, Path(args.output), launcher_arguments, has_adapters(config))
    print(f"{len(written)} strategy files ({layout.describe()}): {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], "glm32k strategy"))

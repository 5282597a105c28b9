"""Shard a whole checkpoint for every NPU of a layout, before the cluster is booked, and check the result."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import ParallelLayout, one_program

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML of the run that will load the shards")
    parser.add_argument(
        "--load_checkpoint",
        required=True,
        help="the whole checkpoint: .ckpt, .safetensors, an index, or a Hugging Face folder",
    )
    parser.add_argument("--output", required=True, help="folder to make: rank_N/checkpoint_N.ckpt and strategy/")
    parser.add_argument("--devices", type=int, help="NPUs of the run; a layout of another size is refused")
    parser.epilog = (
        "Any other option is run_mindformer's. The run then takes --load_checkpoint OUTPUT --auto_trans_ckpt False."
    )


def run(args: argparse.Namespace) -> int:
    from mindformers_glm32k.dryrun.compile.pool import read_layout
    from mindformers_glm32k.weights.checkpoint import open_source
    from mindformers_glm32k.weights.config_json import check_agreement, dims_of_run
    from mindformers_glm32k.weights.finding import config_of
    from mindformers_glm32k.weights.splitting import refuse_existing, split

    try:
        launcher_arguments = ["--config", str(Path(args.config).resolve()), *args.overrides]
        layout, config = read_layout(launcher_arguments, args.devices)
        refuse_existing(Path(args.output))
        open_source(args.load_checkpoint)  # broken, missing or of another model: no need to compile for it
        check_agreement(config_of(args.load_checkpoint), config["model"]["model_config"], args.config)
        with compiled_strategy(args.config, config, layout, launcher_arguments) as strategy:
            dims, model = dims_of_run(config, args.config), config["model"]["model_config"]
            report = split(args.load_checkpoint, args.output, strategy, dims, True, model)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{report['parameters']} parameters{' with optimizer states' if report['optimizer_states'] else ''} sharded "
        f"for {report['ranks']} ranks ({layout.describe()}) and compared with the whole, all equal: {args.output}"
    )
    if report["left_out"]:
        print(
            f"left out: {len(report['left_out'])} entries that the strategy does not know, such as "
            f"{report['left_out'][0]}"
        )
    print(f"load it with: load_checkpoint: {args.output}, auto_trans_ckpt: False")
    return 0


def is_sharded(config: dict, layout: ParallelLayout) -> bool:
    """Whether a run shards its parameters; with one NPU or plain data parallelism every rank has them whole."""
    return layout.world > 1 and one_program(config)


@contextlib.contextmanager
def compiled_strategy(
    config_file: str, config: dict, layout: ParallelLayout, launcher_arguments: list[str]
) -> Iterator[Path]:
    """Yields a temporary folder with the strategy files of a run, compiled here.

    Raises:
        InputError: the run does not shard its parameters.
        CommandFailed: a compile failed.
    """
    from mindformers_glm32k.dryrun.compile.pool import has_adapters, write_strategies

    if not is_sharded(config, layout):
        why = (
            "one NPU (use_parallel is false, or all of parallel_config is 1)"
            if layout.world == 1
            else "data parallel (parallel.parallel_mode)"
        )
        raise InputError(
            f"{config_file}: {why}: every rank has the whole model, there is nothing to shard; load "
            "the whole checkpoint"
        )
    with tempfile.TemporaryDirectory(prefix="glm32k_strategy_") as folder:
        write_strategies(layout, Path(folder), launcher_arguments, has_adapters(config))
        yield Path(folder)


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k split"))

"""Merge the checkpoints of all ranks into one file, LoRA adapters too, and check that nothing was lost."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from mindformers_glm32k.errors import InputError

TAKES_OVERRIDES = True  # with --config, options that are not listed here are run_mindformer's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(name, text, **settings):
        parser.add_argument(name, help=text, **settings)

    option("--src_ckpt_dir", "folder with rank_0, rank_1, …, such as output/checkpoint", required=True)
    option("--dst", "file to write: .ckpt or .safetensors")
    option(
        "--src_ckpt_strategy",
        "the run's strategy: folder (output/strategy) or file. Without it and --config every "
        "rank must have the whole model",
    )
    option(
        "--config",
        "the run's YAML, instead of --src_ckpt_strategy: its strategy is compiled here; also for the "
        "model's sizes and LoRA's scale",
    )
    option("--step", "EPOCH_STEP as in the file names, or the number of steps; default: the newest complete one")
    option("--optimizer_states", "keep adam_m, adam_v, steps and loss scale", action="store_true")
    option("--lora", "add the adapters to the weights", action="store_true")
    option("--lora_scaling", "alpha / rank; default: as --config says, else adapter_config.json of the run", type=float)
    option("--base", "the whole checkpoint that the adapters were trained on, where the ranks' files lack it")
    option("--adapters_only", "also (or, without --dst, only) write the adapters alone to this file", metavar="OUT")
    option(
        "--adapters_format",
        "of --adapters_only: a file with MindFormers' names (default), or a folder that PEFT loads on the published "
        "model (peft) or on transformers' `glm`, as `glm32k export` writes it (peft_glm)",
        choices=("mindformers", "peft", "peft_glm"),
        default="mindformers",
    )
    parser.epilog = "With --config any other option is run_mindformer's."


def run(args: argparse.Namespace) -> int:
    from mindformers_glm32k.weights import merge

    try:
        with strategy_of_run(args) as (strategy, dims, scaling, model_config):
            report = merge(
                args.src_ckpt_dir,
                args.dst,
                strategy,
                args.step,
                args.optimizer_states,
                args.lora,
                scaling,
                args.base,
                args.adapters_only,
                dims,
                progress=True,
                adapters_format=args.adapters_format,
                model_config=model_config,
            )
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for remark in report["remarks"]:
        print(remark)
    counted = "".join(f", {name} {value}" for name, value in report["counters"].items())
    how = "sharded again and compared with every rank's file" if strategy else "compared on all ranks"
    checked = f"; {how}, all equal" if report["ranks"] > 1 else ""
    print(
        f"{len(report['tensors'])} tensors of {report['ranks']} rank(s), {report['stages']} stage(s)"
        f"{counted}{', adapters merged with scale ' + format(scaling, 'g') if args.lora else ''}{checked}: "
        f"{', '.join(report['outputs'])}"
    )
    return 0


@contextlib.contextmanager
def strategy_of_run(args: argparse.Namespace) -> Iterator[tuple]:
    """Yields the strategy's path, the dimensions, LoRA's scale and model_config, each None where nothing says it."""
    scaling = args.lora_scaling
    if not args.config:
        if args.overrides:
            raise InputError(f"{args.overrides[0]}: no such option (run_mindformer's options go with --config)")
        if (args.lora or args.adapters_format != "mindformers") and scaling is None:
            from mindformers_glm32k.weights.lora import scale_of_run

            scaling = scale_of_run(Path(args.src_ckpt_dir))
        yield args.src_ckpt_strategy, None, scaling, None
        return
    from mindformers_glm32k.commands.split import compiled_strategy, is_sharded
    from mindformers_glm32k.dryrun.compile.pool import read_layout
    from mindformers_glm32k.weights.config_json import dims_of_run
    from mindformers_glm32k.weights.lora import scale_of_config

    arguments = ["--config", str(Path(args.config).resolve()), *args.overrides]
    layout, config = read_layout(arguments)
    dims = dims_of_run(config, args.config)
    if (args.lora or args.adapters_format != "mindformers") and scaling is None:
        scaling = scale_of_config(config, args.config)
    if args.src_ckpt_strategy or not is_sharded(config, layout):
        yield args.src_ckpt_strategy, dims, scaling, config["model"]["model_config"]
        return
    with compiled_strategy(args.config, config, layout, arguments) as folder:
        yield folder, dims, scaling, config["model"]["model_config"]


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k merge"))

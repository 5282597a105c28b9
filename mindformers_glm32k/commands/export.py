"""Write a folder that vLLM, vllm-ascend and transformers serve, from a checkpoint or those of all ranks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_glm32k.errors import InputError

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's, for the strategy of a run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(name, text, **settings):
        parser.add_argument(name, help=text, **settings)

    option("--load_checkpoint", "whole checkpoint (file or folder), or a run's folder with rank_N", required=True)
    option("--config", "YAML of the run, or a config.json; not needed where one lies beside the checkpoint")
    option("--tokenizer", "tokenizer.model; needed unless --lora_only")
    option("--output_dir", "folder to make", required=True)
    option("--dtype", "of the weights; default: as stored", choices=("fp32", "fp16", "bf16"))
    option("--max_shard_size", "such as 5GB, the default", default="5GB")
    option("--src_ckpt_strategy", "of rank folders; default: compiled by --config")
    option("--step", "of rank folders: EPOCH_STEP or the number of steps; default: the newest complete one")
    option("--lora", "of rank folders: add the adapters to the weights", action="store_true")
    option("--lora_scaling", "alpha / rank; default: as --config says, else adapter_config.json of the run", type=float)
    option("--base", "the whole checkpoint that the adapters were trained on, where the ranks' files lack it")
    option(
        "--lora_only",
        "of rank folders: write the adapters alone, as a folder for vLLM's --enable-lora and PEFT",
        action="store_true",
    )
    option("--manifest", "of the training data, to name in the model card")
    option("--torch_python", "a Python with torch and transformers, to compare logits there, too", default="")
    option("--no_logits", "do not compare logits", action="store_true")
    option("--workers", "threads; default 2", type=int, default=2)
    parser.epilog = "With --config any other option is run_mindformer's."


def run(args: argparse.Namespace) -> int:
    from mindformers_glm32k.commands.merge import strategy_of_run
    from mindformers_glm32k.export import export
    from mindformers_glm32k.export.folder import has_ranks
    from mindformers_glm32k.weights import merge

    checkpoint, ranks_only = Path(args.load_checkpoint), ("lora", "lora_only", "base", "step", "src_ckpt_strategy")
    ranks = has_ranks(checkpoint)
    given = [name for name in ranks_only if getattr(args, name)]
    if not ranks and given:
        raise InputError(f"--{given[0]} is for a folder with rank_N, {checkpoint} has none")
    if args.overrides and not ranks:
        raise InputError(f"{args.overrides[0]}: no such option (run_mindformer's options go with rank folders)")
    if args.lora and args.lora_only:
        raise InputError("--lora merges the adapters into the weights, --lora_only writes them alone: give one")
    if not args.tokenizer and not args.lora_only:
        raise InputError("--tokenizer: tokenizer.model is needed")
    try:
        if not ranks:
            report = _export(export, args, None)
        else:
            args.src_ckpt_dir, args.adapters_format = (
                args.load_checkpoint,
                "peft_glm" if args.lora_only else "mindformers",
            )
            of_run = argparse.Namespace(**vars(args))
            if str(args.config).endswith(".json"):  # says what the model is, not how the run sharded it
                of_run.config = None
            with strategy_of_run(of_run) as (strategy, dims, scaling, model_config):
                if args.lora_only:
                    report = merge(
                        checkpoint,
                        strategy=strategy,
                        step=args.step,
                        lora_scaling=scaling,
                        adapters_only=args.output_dir,
                        dims=dims,
                        progress=True,
                        adapters_format=args.adapters_format,
                        model_config=model_config,
                    )
                    print(f"{len(report['tensors'])} tensors of adapters: {args.output_dir}")
                    return 0
                merging = dict(strategy=strategy, dims=dims, lora_scaling=scaling, model_config=model_config)
                report = _export(export, args, {**merging, "step": args.step, "lora": args.lora, "base": args.base})
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for sentence in [*report["remarks"], *report["verified"]]:
        print(sentence)
    print(f"{len(report['tensors'])} tensors: vllm serve {args.output_dir}")
    return 0


def _export(export, args, merging):
    return export(
        args.load_checkpoint,
        args.output_dir,
        args.tokenizer,
        args.config,
        args.dtype,
        merging,
        args.max_shard_size,
        args.manifest,
        args.torch_python,
        not args.no_logits,
        args.workers,
        progress=True,
    )


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k export"))

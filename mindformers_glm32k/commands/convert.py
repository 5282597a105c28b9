"""Converts weights between Hugging Face files and MindSpore checkpoints, without loading the model.

Values are never touched except by --dtype; layouts are moved by whole rows (see names.py), so converting back gives
the original bits. All tensors of an output have one dtype: MindFormers casts on load to what its config says
(`param_init_type`, and `layernorm_compute_type` for norms), and casting a 16-bit norm up to fp32 is exact.
"""

from __future__ import annotations

import argparse
import sys

from mindformers_glm32k.checks import true_or_false
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.conversion import DEFAULT_SHARD, convert, convert_reversed
from mindformers_glm32k.weights.tensors import DTYPES
from mindformers_glm32k.weights.writer import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:

    def option(name, text, **settings):
        parser.add_argument(name, help=text, **settings)

    option("--model", "not needed; taken so that upstream's command lines work", choices=("glm-n", "glm32k"))
    option("--input_path", "Hugging Face folder or file; with --reversed the checkpoint", required=True)
    option("--output_path", "checkpoint file to write; with --reversed a folder", required=True)
    option("--reversed", "from MindSpore to Hugging Face", action="store_true")
    option("--dtype", "default: as stored", choices=DTYPES)
    option("--format", "default: by the suffix of --output_path, else ckpt", choices=FORMATS)
    option(
        "--qkv_concat",
        "Q, K, V in one tensor; default: as the YAML of --config says, else True",
        type=true_or_false,
        metavar="True|False",
    )
    option("--mlp_concat", "likewise for gate and up of the MLP", type=true_or_false, metavar="True|False")
    option("--max_shard_size", f"such as 5GB; default: one file, with --reversed {DEFAULT_SHARD}")
    option("--config", "config.json or MindFormers YAML; default: what lies beside the weights")
    option(
        "--hf_naming",
        "names that --reversed writes: the published model's (default) or transformers' own glm",
        choices=("chatglm", "glm"),
        default="chatglm",
    )
    option("--hf_files", "with --reversed: the original folder, to take config, tokenizer and model code from")
    option("--adapter", "folder of a PEFT LoRA adapter to merge into the weights", metavar="PEFT_FOLDER")
    option("--workers", "threads; default 2", type=int, default=2)
    option("--no_crc", "do not compare the checksums that .bin files carry", action="store_true")


def run(args: argparse.Namespace) -> int:
    common = dict(dtype=args.dtype, config=args.config, workers=args.workers, progress=True)
    try:
        if args.reversed:
            if args.format == "ckpt" or args.qkv_concat is not None or args.mlp_concat is not None:
                raise InputError(
                    "--reversed writes safetensors in the layout of --hf_naming: leave --format, "
                    "--qkv_concat and --mlp_concat out"
                )
            if args.adapter:
                raise InputError("--adapter is merged into Hugging Face weights: leave --reversed out, or do it first")
            report = convert_reversed(
                args.input_path,
                args.output_path,
                hf_naming=args.hf_naming,
                hf_files=args.hf_files,
                max_shard_size=args.max_shard_size or DEFAULT_SHARD,
                **common,
            )
        else:
            report = convert(
                args.input_path,
                args.output_path,
                qkv_concat=args.qkv_concat,
                mlp_concat=args.mlp_concat,
                format=args.format,
                max_shard_size=args.max_shard_size,
                check_crc=not args.no_crc,
                adapter=args.adapter,
                **common,
            )
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for remark in report["remarks"]:
        print(remark, file=sys.stderr)
    written = report["output"]
    print(
        f"{len(report['tensors'])} tensors, {report['tensor_bytes']:,} bytes, verified: {written['path']} "
        f"({len(written['files'])} file(s))"
    )
    return 0


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "python -m mindformers_glm32k.commands.convert"))

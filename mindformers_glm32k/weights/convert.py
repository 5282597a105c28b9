"""Converts weights between Hugging Face files and MindSpore checkpoints, without loading the model.

Values are never touched except by --dtype; layouts are moved by whole rows (see names.py), so converting back gives
the original bits. All tensors of the output have one dtype: MindFormers casts on load to what the config says
(`param_init_type`, for norms `layernorm_compute_type`), and casting a 16-bit norm up to fp32 is exact.
"""
import sys
from pathlib import Path

from mindformers_glm32k.cli import run_command
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.dtypes import DTYPES, check_dtype
from mindformers_glm32k.weights.job import Job
from mindformers_glm32k.weights.layout import FORMATS, index_file, lay_out, parse_size
from mindformers_glm32k.weights.plan import check_against, make_groups, make_targets, weights_of
from mindformers_glm32k.weights.sizes import load_config, sizes_from_config, sizes_from_tensors
from mindformers_glm32k.weights.source import open_source


def convert(input_path, output_path, dtype=None, qkv_concat=True, mlp_concat=True, format=None, max_shard_size=None,
            workers=2, progress=False):
    """Converts a Hugging Face checkpoint to a MindSpore one.

    Args:
        input_path (str | os.PathLike): Hugging Face folder, or one weight or index file.
        output_path (str | os.PathLike): `.ckpt` or `.safetensors` file to write.
        dtype (str | None): "fp32", "fp16" or "bf16"; None keeps each tensor's own.
        qkv_concat, mlp_concat (bool): fused (True, upstream's default) or split projections.
        format (str | None): "ckpt" or "safetensors"; None decides by the suffix of output_path.
        max_shard_size (str | int | None): "5GB" and the like; above it the output is sharded, with an index.
        workers (int): threads.
        progress (bool): whether to show progress bars.

    Raises:
        InputError: bad input or options; nothing is left behind.
    """
    if dtype is not None:
        check_dtype(dtype)
    source = open_source(input_path)
    weights, skipped = weights_of(source)
    sizes = sizes_from_config(load_config(source.config), source.config) if source.config else sizes_from_tensors(weights)
    check_against(sizes, weights, source.path)
    output = Path(output_path)
    format = format or ("safetensors" if output.suffix == ".safetensors" else "ckpt")
    if format not in FORMATS:
        raise InputError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    if output.suffix != "." + format:
        output = output.with_name(f"{output.name}.{format}")
    targets = make_targets(sizes, weights, "mindspore", qkv_concat, mlp_concat, dtype)
    groups = make_groups(sizes, weights, targets)
    files = lay_out(targets, format, output.stem, output.suffix, parse_size(max_shard_size), {"format": "ms"})
    index = index_file(files, targets, output.stem, output.suffix)
    job = Job(output.parent, output.name, files, groups, workers, progress)
    job.run()
    job.publish([index] if index else [])


def _boolean(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise ValueError(text)


def add_arguments(parser):
    """Adds the command's options."""
    parser.add_argument("--model", help="accepted for the model card's command line; must be glm-n when given")
    parser.add_argument("--input_path", required=True, help="Hugging Face folder, or one weight or index file")
    parser.add_argument("--output_path", required=True, help="file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of --output_path, else ckpt")
    parser.add_argument("--qkv_concat", type=_boolean, default=True, metavar="True|False", help="default: True")
    parser.add_argument("--mlp_concat", type=_boolean, default=True, metavar="True|False", help="default: True")
    parser.add_argument("--max_shard_size", help="such as 5GB; default: one file")


def run(args):
    """Runs the command."""
    convert(args.input_path, args.output_path, args.dtype, args.qkv_concat, args.mlp_concat, args.format,
            args.max_shard_size, progress=True)
    print(f"wrote {args.output_path}")


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], "python -m mindformers_glm32k.weights.convert"))

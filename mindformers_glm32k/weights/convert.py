"""From Hugging Face files to a MindSpore checkpoint."""

import glob
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.checkpoint import INDEX_SUFFIX
from mindformers_glm32k.weights.hf_config import read_config
from mindformers_glm32k.weights.job import Job
from mindformers_glm32k.weights.layout import FORMATS, index_text, lay_out, parse_size
from mindformers_glm32k.weights.model_dims import sizes_from_config, sizes_from_tensors
from mindformers_glm32k.weights.plan import check_against, make_groups, make_targets
from mindformers_glm32k.weights.report import is_done, load_report, make_report, write_report
from mindformers_glm32k.weights.steps import open_job, open_weights, refuse_overwriting

_PARAM_NAME_MAP = "param_name_map.json"  # where load_distributed_checkpoint looks which file holds a parameter


def convert(
    input_path,
    output_path,
    dtype=None,
    qkv_concat=None,
    mlp_concat=None,
    format=None,
    max_shard_size=None,
    config=None,
    workers=2,
    check_crc=True,
    progress=False,
    reuse=False,
):
    """Converts a Hugging Face checkpoint to a MindSpore one.

    Args:
        input_path (str | os.PathLike): Hugging Face folder, or one weight or index file.
        output_path (str | os.PathLike): `.ckpt` or `.safetensors` file to write.
        dtype (str | None): "fp32", "fp16" or "bf16"; None keeps each tensor's own.
        qkv_concat, mlp_concat (bool | None): fused or split projections; None takes what a YAML `config` says, else
            True, upstream's default.
        format (str | None): "ckpt" or "safetensors"; None decides by the suffix of output_path, else "ckpt".
        max_shard_size (str | int | None): "5GB" and the like; above it the output is sharded, with an index.
        config (str | os.PathLike | None): config.json or MindFormers YAML; by default the source's config.json, and
            without one the sizes come from the tensors.
        workers (int): threads.
        check_crc (bool): whether to compare the checksums that .bin files carry.
        progress (bool): whether to show progress bars.
        reuse (bool): whether to leave an output alone that an earlier conversion of the same files made.

    Returns:
        dict: the report, as written to OUT.report.json beside the output.

    Raises:
        InputError: bad input or options; nothing is left behind.
    """
    source, weights, skipped = open_weights(input_path, dtype, workers)
    output, format = _output_file(output_path, format)
    sizes, fields, layout = _sizes(source, weights, config or source.config)
    check_against(sizes, weights, source.path)
    qkv_concat = layout.get("qkv_concat", True) if qkv_concat is None else qkv_concat
    mlp_concat = layout.get("mlp_concat", True) if mlp_concat is None else mlp_concat
    targets = make_targets(sizes, weights, "mindspore", qkv_concat, mlp_concat, dtype)
    groups = make_groups(sizes, weights, targets)
    files = lay_out(targets, format, output.stem, output.suffix, parse_size(max_shard_size), {"format": "ms"})
    refuse_overwriting(source, [output.parent / file.name for file in files])
    _refuse_older_shards(output, files)
    index = index_text(files)
    names = [output.name + INDEX_SUFFIX] + ([_PARAM_NAME_MAP] if format == "safetensors" else [])
    work, report_path = output.parent / f".{output.name}.partial", output.with_suffix(".report.json")
    job = Job(work, output.parent, files, groups, workers, progress, check_crc)
    with open_job(job):
        if reuse and is_done(job, report_path):
            return load_report(report_path)
        report = make_report(source, output, job, job.run(), skipped, sizes, fields)
        job.publish([(name, index) for name in names] if index else [])
        write_report(report_path, report)  # last: it vouches for what lies there
    return report


def _sizes(source, weights, config):
    """Returns sizes, config.json fields (None when unknown) and the layout that a YAML names."""
    if config is None:
        return sizes_from_tensors(weights), None, {}
    fields, layout = read_config(config)
    return sizes_from_config(fields, config), fields, layout


def _output_file(path, format):
    output = Path(path)
    format = format or ("safetensors" if output.suffix == ".safetensors" else "ckpt")
    if format not in FORMATS:
        raise InputError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    if output.suffix in {f".{name}" for name in FORMATS if name != format}:
        raise InputError(f"{output}: the suffix contradicts format {format}; change one of them")
    if output.suffix != "." + format:
        output = output.with_name(f"{output.name}.{format}")  # as mindspore.save_checkpoint does
    if output.is_dir():
        raise InputError(f"{output}: is a folder, a file name is needed")
    return output, format


def _refuse_older_shards(output, files):
    """Shards and index of an earlier conversion with another shard size would be taken for part of this one."""
    ours = {file.name for file in files} | ({output.name + INDEX_SUFFIX} if len(files) > 1 else set())
    pattern = f"{glob.escape(output.stem)}-[0-9]*-of-[0-9]*{output.suffix}"
    found = [
        path.name
        for path in [*output.parent.glob(pattern), output.with_name(output.name + INDEX_SUFFIX)]
        if path.exists() and path.name not in ours
    ]
    if found:
        raise InputError(
            f"{output.parent}: holds shards of an earlier conversion ({', '.join(sorted(found)[:5])}); "
            "remove them or choose another output path"
        )

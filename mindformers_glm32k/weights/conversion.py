"""Conversions of whole checkpoints: Hugging Face files to a MindSpore checkpoint, and back."""

import contextlib
import glob
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.weights.checkpoint import INDEX_SUFFIX, open_source
from mindformers_glm32k.weights.dtypes import cast, check_dtype
from mindformers_glm32k.weights.hf_config import config_text, find_config, read_config
from mindformers_glm32k.weights.job import Job
from mindformers_glm32k.weights.layout import FORMATS, index_text, lay_out, parse_size
from mindformers_glm32k.weights.model_dims import sizes_from_config, sizes_from_tensors
from mindformers_glm32k.weights.plan import check_against, make_groups, make_targets, weights_of
from mindformers_glm32k.weights.report import is_done, load_report, make_report, write_report

_PARAM_NAME_MAP = "param_name_map.json"  # where load_distributed_checkpoint looks which file holds a parameter
DEFAULT_SHARD = "5GB"  # as transformers' save_pretrained
_INDEX = "model.safetensors.index.json"
_COMPANIONS = ("*.py", "tokenizer*", "special_tokens_map.json", "generation_config.json", "*LICENSE*")


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


def convert_reversed(
    input_path,
    output_path,
    dtype=None,
    hf_naming="chatglm",
    max_shard_size=DEFAULT_SHARD,
    config=None,
    hf_files=None,
    workers=2,
    progress=False,
):
    """Converts a MindSpore checkpoint to a Hugging Face folder: safetensors, index and config.json.

    Args:
        input_path (str | os.PathLike): `.ckpt` or `.safetensors` file, index file or folder.
        output_path (str | os.PathLike): folder to write.
        dtype, workers, progress: as for convert.
        hf_naming (str): "chatglm", the published model's names (remote code, vLLM), or "glm", those of transformers'
            own `glm` model.
        max_shard_size (str | int | None): bytes of one file.
        config (str | os.PathLike | None): the original config.json or the YAML that trained the model; not needed for
            the published sizes, nor beside a config.json or the report of the conversion that made the checkpoint.
        hf_files (str | os.PathLike | None): the original folder; its config.json, tokenizer and model code are used.

    Returns:
        dict: the report, as written to OUT.report.json beside the folder.

    Raises:
        InputError: bad input or options; nothing is left behind.
    """
    if hf_naming not in ("chatglm", "glm"):
        raise InputError(f"hf_naming {hf_naming!r}: choose chatglm or glm")
    source, weights, skipped = open_weights(input_path, dtype, workers)
    sizes = sizes_from_tensors(weights)
    check_against(sizes, weights, source.path)
    fields = find_config(config or hf_files, source, sizes)
    concat = hf_naming == "chatglm"
    targets = make_targets(sizes, weights, hf_naming, concat, True, dtype)
    groups = make_groups(sizes, weights, targets)
    output, stem = Path(output_path), "model"
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file, --reversed writes a folder")
    files = lay_out(targets, "safetensors", stem, ".safetensors", parse_size(max_shard_size), {"format": "pt"})
    refuse_overwriting(source, [output / file.name for file in files])
    _refuse_strangers(output, files)
    index = index_text(files)
    main_dtype = dtype or Counter(target.dtype for target in targets).most_common(1)[0][0]
    work = (output if output.is_dir() else output.parent) / f".{output.name}.partial"
    texts = [("config.json", config_text(fields, hf_naming, main_dtype))] + ([(_INDEX, index)] if index else [])
    with open_job(Job(work, output, files, groups, workers, progress)) as job:
        report = make_report(source, output, job, job.run(), skipped, sizes, fields)
        job.publish(texts)
        write_report(output.with_name(output.name + ".report.json"), report)
    if hf_files:
        _copy_companions(Path(hf_files), output, hf_naming)
    return report


def _refuse_strangers(folder, files):
    """Weight files of another kind in the folder would be loaded instead of, or mixed with, the new ones."""
    ours = {file.name for file in files} | ({_INDEX} if len(files) > 1 else set())
    found = (
        [
            path.name
            for pattern in ("*.safetensors*", "pytorch_model*", "*.bin")
            for path in folder.glob(pattern)
            if path.name not in ours
        ]
        if folder.is_dir()
        else []
    )
    if found:
        raise InputError(
            f"{folder}: already holds other weights ({', '.join(sorted(set(found))[:5])}); choose an empty folder"
        )


def _copy_companions(folder, output, naming):
    for pattern in _COMPANIONS:
        for path in sorted(folder.glob(pattern)):
            # The published modeling code belongs to the published names; `glm` is transformers' own.
            if path.is_file() and not (naming == "glm" and path.name.startswith(("modeling_", "configuration_"))):
                with atomic_path(output / path.name) as temporary:
                    shutil.copyfile(path, temporary)


def load_hf_weights(path):
    """Iterates over the weights of a Hugging Face checkpoint, one tensor in memory at a time.

    Args:
        path (str | os.PathLike): as input_path of convert.

    Yields:
        tuple[str, numpy.ndarray]: name as in the file, values; bf16 is widened to float32, which is exact. Buffers
        are skipped.
    """
    weights, _ = weights_of(open_source(path))
    for tensor in weights.values():
        values = tensor.load()
        yield tensor.name, cast(values, "bf16", "fp32") if tensor.dtype == "bf16" else np.asarray(values)


def open_weights(input_path, dtype, workers):
    """Checks the common options and lists what there is to convert.

    Returns:
        tuple[Source, dict[Slot, StoredTensor], list[str]]: the source, its weights, the names that are skipped.

    Raises:
        InputError
    """
    if dtype is not None:
        check_dtype(dtype)
    if type(workers) is not int or workers < 1:
        raise InputError(f"workers {workers!r}: a number of threads, 1 or more, is needed")
    source = open_source(input_path)
    return (source, *weights_of(source))


@contextlib.contextmanager
def open_job(job):
    """Enters a Job; a folder or disk that cannot be written becomes an InputError."""
    try:
        with job:
            yield job
    except OSError as error:
        raise InputError(f"{error.filename or job.destination}: cannot be written ({error.strerror})") from error


def refuse_overwriting(source, outputs):
    """Raises InputError when one of the output paths is a file that is being read."""
    read = {os.path.realpath(file) for file in source.files}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise InputError(f"{path}: is one of the files to convert; choose another output path")

"""Conversions of whole checkpoints: Hugging Face files to a MindSpore checkpoint, and back.

A conversion runs about as fast as the disk copies, so one that was killed starts again: no file gets its final name
before every tensor has been read back and compared.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import copy_atomically, require_space, work_folder
from mindformers_glm32k.weights.checkpoint import (
    Source,
    TensorGroup,
    check_against,
    make_groups,
    make_targets,
    open_source,
    weights_of,
)
from mindformers_glm32k.weights.config_json import check_agreement, config_text, dims_from_config, read_config
from mindformers_glm32k.weights.finding import INDEX_SUFFIX, config_of, find_config
from mindformers_glm32k.weights.names import ModelDims, TensorKey, dims_from_tensors
from mindformers_glm32k.weights.peft import merge_adapter
from mindformers_glm32k.weights.tensors import StoredTensor, cast, check_dtype
from mindformers_glm32k.weights.writer import (
    FORMATS,
    CheckpointWriter,
    OutputFile,
    index_text,
    lay_out,
    parse_size,
    publish,
    write_groups,
    write_report,
)

DEFAULT_SHARD = "5GB"  # as transformers' save_pretrained
_PARAM_NAME_MAP = "param_name_map.json"  # where load_distributed_checkpoint looks up the file of a parameter
_HF_INDEX = "model.safetensors.index.json"
_COMPANIONS = ("*.py", "tokenizer*", "special_tokens_map.json", "generation_config.json", "*LICENSE*")


def convert(
    input_path: str | os.PathLike,
    output_path: str | os.PathLike,
    dtype: str | None = None,
    qkv_concat: bool | None = None,
    mlp_concat: bool | None = None,
    format: str | None = None,
    max_shard_size: str | int | None = None,
    config: str | os.PathLike | None = None,
    workers: int = 2,
    check_crc: bool = True,
    progress: bool = False,
    reuse: bool = False,
    adapter: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Converts a Hugging Face checkpoint to a MindSpore one; returns the report, as written to OUT.report.json.

    Args:
        input_path: Hugging Face folder, or one weight or index file.
        output_path: `.ckpt` or `.safetensors` file to write.
        dtype: "fp32", "fp16" or "bf16"; None keeps each tensor's own.
        qkv_concat, mlp_concat: fused or split projections; None takes what a YAML `config` says, else True, upstream's
            default.
        format: one of FORMATS; None decides by the suffix of output_path, else "ckpt".
        max_shard_size: bytes, or "5GB" and the like; above it the output is sharded, with an index.
        config: config.json or MindFormers YAML; by default the source's config.json, and without one the dimensions
            come from the tensors.
        workers: threads.
        check_crc: whether to compare the checksums that .bin files carry.
        progress: whether to show progress bars.
        reuse: whether to keep an output that an earlier conversion of the same files with the same options made.
        adapter: folder of a PEFT LoRA adapter, which is merged into the weights.

    Raises:
        InputError: bad input or options; nothing is left behind.
    """
    source, weights, skipped, remarks = _open_weights(input_path, dtype, workers)
    output = _output_file(output_path, format)
    dims, fields, layout = _dims(source, weights, config, remarks)
    check_against(dims, weights, source.path)
    if adapter is not None:
        weights, merged = merge_adapter(adapter, weights, dims, check_crc)
        remarks.append(merged)
    qkv_concat = layout.get("qkv_concat", True) if qkv_concat is None else qkv_concat
    mlp_concat = layout.get("mlp_concat", True) if mlp_concat is None else mlp_concat
    targets = make_targets(dims, weights, "mindspore", qkv_concat, mlp_concat, dtype)
    groups = make_groups(dims, weights, targets)
    files = lay_out(targets.values(), output.name, parse_size(max_shard_size))
    _refuse_overwriting(source, [output.parent / file.name for file in files])
    _refuse_older_shards(output, files)
    index = index_text(files)
    names = [output.name + INDEX_SUFFIX] + ([_PARAM_NAME_MAP] if output.suffix == ".safetensors" else [])
    report_path, fingerprint = output.with_suffix(".report.json"), _fingerprint(files, groups)
    with work_folder(output) as work:
        done = _load_report(report_path) if reuse else {}
        if done.get("fingerprint") == fingerprint and all(_has_size(output.parent / file.name, file) for file in files):
            return {"remarks": remarks, **done}
        tensors = _write(work, output.parent, files, groups, workers, progress, remarks, check_crc)
        publish(work, output.parent, [file.name for file in files], dict.fromkeys(names, index) if index else {})
        report = _report(source, output, files, fingerprint, tensors, skipped, dims, fields, remarks)
        write_report(report_path, report)  # last: a report means that its files are complete
    return report


def convert_reversed(
    input_path: str | os.PathLike,
    output_path: str | os.PathLike,
    dtype: str | None = None,
    hf_naming: str = "chatglm",
    max_shard_size: str | int | None = DEFAULT_SHARD,
    config: str | os.PathLike | None = None,
    hf_files: str | os.PathLike | None = None,
    workers: int = 2,
    progress: bool = False,
) -> dict[str, Any]:
    """Converts a MindSpore checkpoint to a Hugging Face folder that transformers and vLLM load: safetensors, index and
    config.json. Returns the report, as written to OUT.report.json beside the folder.

    Args:
        input_path: `.ckpt` or `.safetensors` file, index file or folder.
        output_path: folder to write.
        dtype, workers, progress: as for convert.
        hf_naming: "chatglm", the published model's names (remote code, vLLM), or "glm", those of transformers' own
            `glm` model.
        max_shard_size: bytes of one file, or "5GB" and the like.
        config: the original config.json or the YAML that trained the model; not needed for the published dimensions,
            nor where a config.json or the report of the conversion that made the checkpoint lies beside it.
        hf_files: the original folder; its config.json, tokenizer and model code are used.

    Raises:
        InputError: bad input or options; nothing is left behind.
    """
    if hf_naming not in ("chatglm", "glm"):
        raise InputError(f"hf_naming {hf_naming!r}: choose chatglm or glm")
    source, weights, skipped, remarks = _open_weights(input_path, dtype, workers)
    dims = dims_from_tensors(weights)
    check_against(dims, weights, source.path)
    known = find_config(config or hf_files, source.path, dims)
    fields = known.fields
    remarks += known.notes
    targets = make_targets(dims, weights, hf_naming, hf_naming == "chatglm", True, dtype)
    groups = make_groups(dims, weights, targets)
    output = Path(output_path)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file, --reversed writes a folder")
    files = lay_out(targets.values(), "model.safetensors", parse_size(max_shard_size), "pt")
    _refuse_overwriting(source, [output / file.name for file in files])
    _refuse_other_weights(output, files)
    index = index_text(files)
    main_dtype = dtype or Counter(target.dtype for target in targets.values()).most_common(1)[0][0]
    texts = {"config.json": config_text(fields, hf_naming, main_dtype), **({_HF_INDEX: index} if index else {})}
    with work_folder(output, output if output.is_dir() else None) as work:
        tensors = _write(work, output, files, groups, workers, progress, remarks)
        publish(work, output, [file.name for file in files], texts)
        report = _report(source, output, files, _fingerprint(files, groups), tensors, skipped, dims, fields, remarks)
        write_report(output.with_name(output.name + ".report.json"), report)
    if hf_files:
        _copy_companions(Path(hf_files), output, hf_naming)
    return report


def load_hf_weights(path: str | os.PathLike) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the weights of a Hugging Face checkpoint, one tensor in memory at a time: the name as in the file, and the
    values; bf16 is widened to float32, which is exact. Buffers are skipped."""
    weights, _, _ = weights_of(open_source(path))
    for tensor in weights.values():
        values = tensor.load()
        yield tensor.name, cast(values, "bf16", "fp32") if tensor.dtype == "bf16" else np.asarray(values)


def _open_weights(input_path, dtype, workers):
    """Checks the common options; returns the source, its weights, the names that are skipped, and notes."""
    if dtype is not None:
        check_dtype(dtype)
    if type(workers) is not int or workers < 1:
        raise InputError(f"workers {workers!r}: a number of threads, 1 or more, is needed")
    source = open_source(input_path)
    weights, skipped, notes = weights_of(source)
    return source, weights, skipped, [*source.notes, *notes]


def _dims(
    source: Source, weights: Mapping[TensorKey, StoredTensor], config: str | os.PathLike | None, remarks: list[str]
) -> tuple[ModelDims, dict[str, Any] | None, dict[str, bool]]:
    """Returns dimensions, config.json fields (None when unknown) and the layout that a YAML names."""
    beside = config_of(source.path) or (read_config(source.config) if source.config else None)
    known = beside if config is None else read_config(config)
    if known is None:
        remarks.append(f"{source.path}: no config.json beside it: rope_ratio and epsilon are unknown and not checked")
        return dims_from_tensors(weights), None, {}
    dims = dims_from_config(known.fields, known.origin)
    check_agreement(beside, known.fields, known.origin)
    remarks += known.notes
    return dims, known.fields, known.layout


def _output_file(path, format):
    output = Path(path)
    if output.is_dir():
        raise _is_folder(output)
    format = format or ("safetensors" if output.suffix == ".safetensors" else "ckpt")
    if format not in FORMATS:
        raise InputError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    if output.suffix in {f".{name}" for name in FORMATS if name != format}:
        raise InputError(f"{output}: the suffix contradicts format {format}; change one of them")
    if output.suffix != "." + format:
        output = output.with_name(f"{output.name}.{format}")  # as mindspore.save_checkpoint does
    if output.is_dir():
        raise _is_folder(output)
    return output


def _is_folder(path):
    return InputError(f"{path}: is a folder; give the name of a file, such as {path / 'model.ckpt'}")


def _refuse_overwriting(source, outputs):
    read = {os.path.realpath(file) for file in source.files}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise InputError(f"{path}: is one of the files to convert; choose another output path")


def _refuse_older_shards(output, files):
    """Shards and index of an earlier conversion with another shard size would be taken for part of this one."""
    ours = {file.name for file in files} | ({output.name + INDEX_SUFFIX} if len(files) > 1 else set())
    shards = output.parent.glob(f"{glob.escape(output.stem)}-[0-9]*-of-[0-9]*{output.suffix}")
    found = sorted(
        path.name
        for path in [*shards, output.with_name(output.name + INDEX_SUFFIX)]
        if path.exists() and path.name not in ours
    )
    if found:
        raise InputError(
            f"{output.parent}: holds shards of an earlier conversion ({', '.join(found[:5])}); "
            "remove them or choose another output path"
        )


def _refuse_other_weights(folder, files):
    """Weight files of another kind in the folder would be loaded instead of, or mixed with, the new ones."""
    ours = {file.name for file in files} | ({_HF_INDEX} if len(files) > 1 else set())
    found = {path.name for pattern in ("*.safetensors*", "pytorch_model*", "*.bin") for path in folder.glob(pattern)}
    if found - ours:
        raise InputError(
            f"{folder}: already holds other weights ({', '.join(sorted(found - ours)[:5])}); choose an empty folder"
        )


def _fingerprint(files: Sequence[OutputFile], groups: Sequence[TensorGroup]) -> str:
    """SHA-256 of all that decides the bytes of the output: sources, options and layout."""
    plan: list[Any] = [[file.name, file.size, list(file.segments.items())] for file in files]
    for path in sorted({source.file for group in groups for source in group.sources}):
        status = os.stat(path)
        plan.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    for group in groups:
        plan += [[m.source.name, m.source_start, m.target.name, m.target_start, m.count] for m in group.moves]
    return hashlib.sha256(json.dumps(plan).encode("utf-8")).hexdigest()


def _load_report(path):
    """Reads a report back; empty when there is none or it cannot be read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _has_size(path, file):
    return path.is_file() and path.stat().st_size == file.size


def _write(work, destination, files, groups, workers, progress, remarks, check_crc=True):
    """Writes and verifies all files in the work folder; returns the report's entries on their tensors."""
    require_space(destination, sum(file.size for file in files), work)
    with CheckpointWriter(work, files) as writer:
        write_groups(writer, groups, workers, progress, check_crc)
        writer.finish(workers, progress)
    remarks += [
        f"WARNING: {tensor.file}: key {tensor.name!r}: {'all' if nbytes >= tensor.nbytes else nbytes} of its "
        f"{tensor.nbytes} bytes are zeros; is the download whole?"
        for tensor, nbytes in writer.zeros.items()
    ]
    remarks += [
        f"WARNING: {tensor.file}: key {tensor.name!r}: {count} of its values are NaN or infinite; the model that was "
        "saved there had diverged, or the file is damaged"
        for tensor, count in writer.not_finite.items()
    ]
    holder = {tensor.name: file.name for file in files for tensor in file.segments}
    tensors = {name: {"file": holder[name], **entry} for name, entry in writer.describe().items()}
    for group in groups:
        for move in group.moves:
            origins = tensors[move.target.name].setdefault("from", [])
            if move.source.name not in origins:
                origins.append(move.source.name)
    return tensors


def _report(source, output, files, fingerprint, tensors, skipped, dims, fields, remarks):
    """What was read and written, and a checksum of every tensor; convert_reversed reads the config.json from it."""
    return {
        "source": {"path": str(source.path), "files": {file.name: file.stat().st_size for file in source.files}},
        "output": {"path": str(output), "files": {file.name: file.size for file in files}},
        "fingerprint": fingerprint,
        "checksums": "of the little-endian values, without the file format's framing",
        "tensor_bytes": sum(tensor.nbytes for file in files for tensor in file.segments),
        "sizes": asdict(dims),
        "skipped": skipped,
        "remarks": remarks,
        "huggingface_config": fields,
        "tensors": tensors,
    }


def _copy_companions(folder, output, naming):
    for pattern in _COMPANIONS:
        for path in sorted(folder.glob(pattern)):
            # The published modeling code belongs to the published names; `glm` is transformers' own.
            if path.is_file() and not (naming == "glm" and path.name.startswith(("modeling_", "configuration_"))):
                copy_atomically(path, output / path.name)

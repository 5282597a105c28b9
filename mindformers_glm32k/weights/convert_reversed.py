"""From a MindSpore checkpoint to a Hugging Face folder that transformers and vLLM load."""

import shutil
from collections import Counter
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.weights.hf_config import config_text, find_config
from mindformers_glm32k.weights.job import Job
from mindformers_glm32k.weights.layout import index_text, lay_out, parse_size
from mindformers_glm32k.weights.model_dims import sizes_from_tensors
from mindformers_glm32k.weights.plan import check_against, make_groups, make_targets
from mindformers_glm32k.weights.report import make_report, write_report
from mindformers_glm32k.weights.steps import open_job, open_weights, refuse_overwriting

DEFAULT_SHARD = "5GB"  # as transformers' save_pretrained
_INDEX = "model.safetensors.index.json"
_COMPANIONS = ("*.py", "tokenizer*", "special_tokens_map.json", "generation_config.json", "*LICENSE*")


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

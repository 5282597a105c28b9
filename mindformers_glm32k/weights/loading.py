"""A Hugging Face folder as `load_checkpoint` of a run: converted once, in the run's output folder, then loaded.

MindFormers itself can load Hugging Face safetensors (`load_ckpt_format: safetensors`), but its conversion knows one
switch for two layouts: with `qkv_concat: True, mlp_concat: False`, or with `glm` names and the switches the other way
round, it silently leaves the MLP at its random initialization; it refuses a fused file for `qkv_concat: False` in
prediction, holds whole shards in memory and reads no .bin files. Here every layout, naming and file kind is converted
by the same checked conversion as `glm32k convert`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import Busy
from mindformers_glm32k.weights.checkpoint import open_source, read_file
from mindformers_glm32k.weights.config_json import check_agreement
from mindformers_glm32k.weights.conversion import convert
from mindformers_glm32k.weights.finding import ADAPTER_CONFIG, INDEX_SUFFIX, config_of, snapshot_of
from mindformers_glm32k.weights.names import (
    STATE_PREFIXES,
    adapter_of,
    foreign_kind,
    key_of,
    name_of,
    plain_name,
    unwrapped,
)
from mindformers_glm32k.weights.writer import FORMATS

FOLDER = "converted_from_huggingface"
_WAIT_SECONDS = 1.0


def is_huggingface(path: str | os.PathLike) -> bool:
    """Whether a folder holds weight files under other names than MindFormers', which a conversion then reads or refuses
    with a message. False for single files, and for folders without weight files such as those with rank_N subfolders.

    Raises:
        InputError: weight files are there, but broken or incomplete; or a hub's cache with several snapshots.
    """
    path = Path(path)
    if not path.is_dir():
        return False
    folder = snapshot_of(path)
    if folder == path and not any(
        entry.suffix in (".safetensors", ".bin") or entry.name.endswith(".index.json") or entry.name == ADAPTER_CONFIG
        for entry in path.iterdir()
    ):
        return False
    names = open_source(folder).tensors
    return any(map(_is_foreign, names)) or not any(map(_is_mindspore, names))


def _is_foreign(name):
    plain = unwrapped(name)[0]
    try:
        key = key_of(plain)
    except InputError:
        return foreign_kind([name]) is not None
    return key is not None and name != name_of(key, "mindspore")


def _is_mindspore(name):
    """Whether MindFormers itself writes such a name: a weight, an adapter, a state or a counter."""
    if adapter_of(plain_name(name)) or name.startswith(STATE_PREFIXES):
        return True
    try:
        return key_of(name) is not None
    except InputError:
        return False


def _refuse_foreign_file(path):
    """Refuses one file of a Hugging Face folder, at which MindFormers fails with a message that misleads."""
    what = None
    if path.suffix in (".bin", ".pt", ".pth") or path.name.endswith(INDEX_SUFFIX):
        what = "a file"
    elif path.suffix == ".safetensors" and any(_is_foreign(tensor.name) for tensor in read_file(path)):
        what = "one file"
    if what:
        raise InputError(
            f"load_checkpoint {path}: {what} of a Hugging Face checkpoint; give the folder, {path.parent}, or convert "
            f"it first: glm32k convert --input_path {path.parent} --output_path OUT.ckpt"
        )


def checkpoint_to_load(
    path: str | None,
    output_dir: str | os.PathLike,
    format: str = "ckpt",
    qkv_concat: bool = True,
    mlp_concat: bool = True,
    shard_later: bool = False,
    model_config: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> str | None:
    """The path for MindFormers to load: `path` itself, or the conversion of a Hugging Face folder.

    Safe to call from all processes of a run: one converts, the others wait for it (on a shared disk; on disks of
    their own, each machine converts once). A later run with the same files reuses the conversion.

    Args:
        path: load_checkpoint.
        output_dir: the run's output folder.
        format: load_ckpt_format, "ckpt" or "safetensors".
        qkv_concat, mlp_concat: the model's layout.
        shard_later: auto_trans_ckpt: MindFormers then wants a folder, not a file.
        model_config: the run's; the config beside the checkpoint must agree with it in fields that shapes do not show.
        log: called with each remark of the conversion.

    Raises:
        InputError: the Hugging Face files are broken, incomplete or of another model; or one file of them is given.
    """
    if not path or not os.path.exists(path):
        return path
    if os.path.isfile(path):
        _refuse_foreign_file(Path(path))
    foreign = is_huggingface(path)
    if model_config is not None:
        known = config_of(path)
        check_agreement(known, model_config, "model.model_config of this run")
    if not foreign:
        return path
    format = format if format in FORMATS else "ckpt"
    folder = Path(output_dir) / FOLDER
    # For sharding, MindFormers wants a whole .ckpt in rank_0, as of a run with one rank; safetensors alone in a folder.
    file = folder / ("rank_0" if shard_later and format == "ckpt" else "") / f"model.{format}"
    while True:
        try:
            for remark in convert(path, file, qkv_concat=qkv_concat, mlp_concat=mlp_concat, reuse=True)["remarks"]:
                log(remark)
            break
        except Busy:
            time.sleep(_WAIT_SECONDS)
    return str(folder if shard_later else file)

"""A Hugging Face folder as `load_checkpoint` of a run: converted once, in the run's output folder, then loaded.

MindFormers itself can load Hugging Face safetensors (`load_ckpt_format: safetensors`), but its conversion knows one
switch for two layouts: with `qkv_concat: True, mlp_concat: False`, or with `glm` names and the switches the other way
round, it leaves the MLP at its random start without a word; it refuses a fused file for `qkv_concat: False` in
prediction, holds whole shards in memory and reads no .bin files. Here every layout, naming and file kind is converted
by the same checked conversion as `glm32k convert`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from mindformers_glm32k.files import Busy
from mindformers_glm32k.weights.checkpoint import open_source
from mindformers_glm32k.weights.conversion import convert
from mindformers_glm32k.weights.names import key_of, name_of
from mindformers_glm32k.weights.writer import FORMATS

FOLDER = "converted_from_huggingface"
_WAIT_SECONDS = 1.0


def is_huggingface(path: str | os.PathLike) -> bool:
    """Whether a folder holds weights under Hugging Face names, judged by those that differ from MindFormers'; not so
    files, and folders without whole checkpoints, such as those with rank_N subfolders.

    Raises:
        InputError: weight files are there, but broken or incomplete.
    """
    path = Path(path)
    if not path.is_dir() or not any(
        entry.suffix in (".safetensors", ".bin") or entry.name.endswith(".index.json") for entry in path.iterdir()
    ):
        return False
    return any(_is_foreign(name) for name in open_source(path).tensors)


def _is_foreign(name):
    try:
        key = key_of(name)
    except ValueError:  # adapters and the like: not for this module to judge
        return False
    return key is not None and name != name_of(key, "mindspore")


def checkpoint_to_load(
    path: str | None,
    output_dir: str | os.PathLike,
    format: str = "ckpt",
    qkv_concat: bool = True,
    mlp_concat: bool = True,
    shard_later: bool = False,
) -> str | None:
    """What MindFormers shall load in place of `path`, which stays unless it is a Hugging Face folder.

    Safe to call from all processes of a run: one converts, the others wait for it (on a shared disk; on disks of
    their own, each machine converts once). A later run with the same files finds the work done.

    Args:
        path: load_checkpoint.
        output_dir: the run's output folder.
        format: load_ckpt_format, "ckpt" or "safetensors".
        qkv_concat, mlp_concat: the model's layout.
        shard_later: auto_trans_ckpt: MindFormers then wants a folder, not a file.

    Raises:
        InputError: the Hugging Face files are broken, incomplete or of another model.
    """
    if not path or not is_huggingface(path):
        return path
    format = format if format in FORMATS else "ckpt"
    folder = Path(output_dir) / FOLDER
    # MindFormers shards a whole .ckpt as that of a run with one rank, whole safetensors as the one file of a folder.
    file = folder / ("rank_0" if shard_later and format == "ckpt" else "") / f"model.{format}"
    while True:
        try:
            convert(path, file, qkv_concat=qkv_concat, mlp_concat=mlp_concat, reuse=True)
            break
        except Busy:
            time.sleep(_WAIT_SECONDS)
    return str(folder if shard_later else file)

"""The checkpoints that training saves: their names, their steps and meta.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, flush_folder
from mindformers_glm32k.weights.checkpoint import read_file
from mindformers_glm32k.weights.rank_files import count_of

LABEL = re.compile(r"-(\d+)_(\d+)\.\w+$")


def step_of(path: Path) -> float:
    """The step after which a checkpoint was saved: its step_num; without one a number in the order of the name's
    EPOCH_STEP; -1 for a truncated file."""
    try:
        tensors = {tensor.name: tensor for tensor in read_file(path)}
    except InputError:
        return -1
    step = count_of(tensors.get("step_num"))
    if step is not None:
        return step
    label = LABEL.search(path.name)
    return int(label[1]) + int(label[2]) / 1e9 if label else -1


def saved_files(folder: str | os.PathLike, prefix: str, suffix: str) -> list[tuple[Path, float]]:
    """The checkpoints PREFIX-EPOCH_STEP.SUFFIX in a folder with their steps, the earliest first."""
    name = re.compile(re.escape(prefix) + r"-\d+_\d+\." + re.escape(suffix))
    files = [(path, step_of(path)) for path in Path(folder).iterdir() if name.fullmatch(path.name)]
    return sorted(files, key=lambda file: (file[1], file[0]))


def prefix_for(folder: Path, name: str, resumed: bool) -> str:
    """The prefix of a run's checkpoint names: `name`, and a number where other runs have left files.

    A resumed run keeps the prefix that `meta.json` has. All ranks find the same number.

    Args:
        folder: with subfolders rank_N.
        name: "PREFIX_rank_N".
        resumed: whether the run resumes from a checkpoint.
    """
    head, rank = name.rsplit("_", 1)
    pattern = re.compile(re.escape(head) + r"_(\d+)(?:_(\d+))?-\d+_\d+\.\w+")
    if resumed:
        last = re.match(pattern, str(read_meta(folder / f"rank_{rank}").get("last_ckpt_file")))
        return f"{name}_{last[2]}" if last and last[2] else name
    found = [pattern.fullmatch(path.name) for path in folder.glob("rank_*/*")]
    taken = [int(match[2] or 0) for match in found if match]
    return f"{name}_{max(taken) + 1}" if taken else name


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of `meta.json` in a rank's folder; empty where it is missing or damaged."""
    try:
        found = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_meta(path: str, epoch: int, step: int, name: str, global_step: int, run: Mapping[str, Any]) -> None:
    """Writes upstream's three keys, by which it finds the checkpoint to resume from, and those of the run."""
    keys = {"last_epoch": epoch, "last_step": step, "last_ckpt_file": name, "global_step": global_step}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({**keys, **run}), encoding="utf-8")
    flush_folder(Path(path).parent)

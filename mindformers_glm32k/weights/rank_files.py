"""The checkpoints that a parallel run left, one file per rank: which belong together, and which can be merged."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.checkpoint import read_file
from mindformers_glm32k.weights.tensors import FROM_MINDSPORE, StoredTensor, item_size

_RANK_FOLDER = re.compile(r"rank_(\d+)$")
# glm32k_rank_3-1_200.ckpt, glm32k_rank_3_1-1_200.ckpt (a later run of the same folder), checkpoint_3.ckpt
_NAMES = (
    re.compile(r"(?P<head>.+_rank_)(?P<rank>\d+)(?P<tail>\D.*)$"),
    re.compile(r"(?P<head>checkpoint_?)(?P<rank>\d+)(?P<tail>\.\w+)$"),
)
_STEP = re.compile(r"-(\d+)_(\d+)\.\w+$")
_COUNTERS = ("epoch_num", "step_num", "global_step")


@dataclass
class RankFiles:
    """One checkpoint of a run: a file per rank, named alike apart from the rank.

    Args:
        name: the files' name, with * for the rank.
        files: by rank.
        tensors: by rank, then by name; filled in by `read`.
        counters: values of epoch_num, step_num and global_step, where the files have them.
    """

    name: str
    files: dict[int, Path]
    tensors: dict[int, dict[str, StoredTensor]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        """Epoch and step in the file names, such as "2_20"; None where they have none."""
        match = _STEP.search(self.name)
        return f"{match[1]}_{match[2]}" if match else None

    def age(self) -> tuple[int, tuple[int, ...], float]:
        """A sort key that grows with training: step_num inside, then epoch and step in the name, then file time."""
        label = tuple(map(int, self.label.split("_"))) if self.label else ()
        return (self.counters.get("step_num", -1), label, max(path.stat().st_mtime for path in self.files.values()))

    def read(self, ranks: range) -> None:
        """Lists the tensors in the files of `ranks`.

        Raises:
            InputError: a rank has no file, a file is broken, or files are of different steps.
        """
        missing = [rank for rank in ranks if rank not in self.files]
        if missing:
            raise InputError(
                f"{self.name}: the file of rank{'s' if len(missing) > 1 else ''} "
                f"{', '.join(map(str, missing))} is missing; ranks {ranks[0]} to {ranks[-1]} are needed"
            )
        for rank in ranks:
            self.tensors[rank] = {tensor.name: tensor for tensor in read_file(self.files[rank])}
            found = {name: count_of(self.tensors[rank].get(name)) for name in _COUNTERS}
            for name, value in found.items():
                expected = self.counters.setdefault(name, value) if value is not None else None
                if value != expected:
                    raise InputError(
                        f"{self.files[rank]}: {name} is {value}, in {self.files[ranks[0]]} it is "
                        f"{expected}; the files are of different steps"
                    )


def scalar_of(tensor: StoredTensor | None) -> float | None:
    """The value of a float32 scalar, such as the loss scale, None where there is none."""
    if tensor is None or FROM_MINDSPORE.get(tensor.dtype, tensor.dtype) not in ("fp32", "F32"):
        return None
    return struct.unpack("<f", tensor.raw_bytes()[:4])[0]


def count_of(tensor: StoredTensor | None) -> int | None:
    """The value of a counter, None where there is none or it is no integer."""
    if tensor is None or tensor.dtype not in ("Int64", "I64", "Int32", "I32"):
        return None
    return struct.unpack("<q" if item_size(tensor.dtype) == 8 else "<i", tensor.raw_bytes())[0]


def find_rank_files(folder: str | os.PathLike) -> list[RankFiles]:
    """Finds the checkpoints below a folder with subfolders rank_N, such as output/checkpoint, sorted by name.

    Raises:
        InputError: no such folders or files, or a file that lies in another rank's folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; the folder that holds rank_0, rank_1, … is needed, such as output/checkpoint"
        )
    sets = {}
    for subfolder in sorted(folder.iterdir()):
        match = _RANK_FOLDER.match(subfolder.name)
        for path in sorted(subfolder.iterdir()) if match and subfolder.is_dir() else ():
            if path.suffix in (".ckpt", ".safetensors") and not path.name.startswith("."):
                rank = int(match[1])
                name = _common_name(path, rank)
                sets.setdefault(name, RankFiles(name, {})).files[rank] = path
    if not sets:
        raise InputError(
            f"{folder}: no rank_N/*.ckpt or *.safetensors below it; the folder that holds rank_0, rank_1, "
            "… is needed, such as output/checkpoint"
        )
    return [sets[name] for name in sorted(sets)]


def _common_name(path, rank):
    for pattern in _NAMES:
        match = pattern.match(path.name)
        if match:
            if int(match["rank"]) != rank:
                raise InputError(
                    f"{path}: is rank {match['rank']}'s file by its name, but lies in the folder of rank "
                    f"{rank}: files were swapped; move it back"
                )
            return f"{match['head']}*{match['tail']}"
    return path.name


def rank_folders(folder: str | os.PathLike) -> list[Path]:
    """The subfolders rank_N of a folder, by name."""
    return sorted(path for path in Path(folder).glob("rank_*") if _RANK_FOLDER.match(path.name) and path.is_dir())


def choose(
    folder: str | os.PathLike,
    ranks: range | None = None,
    step: str | int | None = None,
    wanted: Callable[[RankFiles], bool] | None = None,
) -> tuple[RankFiles, list[str]]:
    """Picks the checkpoint to merge and lists what is in its files; returns remarks for the user, too.

    Args:
        folder: as for `find_rank_files`.
        ranks: those of the layout; None: 0 to the highest that has a folder.
        step: "EPOCH_STEP" as in the file names, or step_num inside; None takes the newest complete one.
        wanted: filter of the checkpoints to choose from; None: all.

    Raises:
        InputError: no checkpoint is complete, or none is of that step.
    """
    sets = find_rank_files(folder)
    present = sorted({rank for each in sets for rank in each.files})
    if ranks is not None and present[-1] >= len(ranks):
        raise InputError(
            f"{folder}: holds rank_{present[-1]}, but the strategy is for {len(ranks)} NPUs: it belongs "
            "to another layout"
        )
    ranks = ranks or range(present[-1] + 1)
    complete, broken = [], {}
    sets = [each for each in sets if wanted is None or wanted(each)]
    for each in sets:
        try:
            each.read(ranks)
            complete.append(each)
        except InputError as error:
            broken[each.name] = error
    if step is not None:
        return _of_step(folder, sets, complete, broken, str(step))
    if not complete:
        raise InputError(f"{folder}: no checkpoint is complete:\n  " + "\n  ".join(map(str, broken.values())))
    chosen = max(complete, key=RankFiles.age)
    remarks = [f"left out, not complete: {error}" for error in broken.values()]
    if len(complete) > 1:
        remarks.insert(0, f"{len(complete)} checkpoints are complete, the newest is taken: {chosen.name}")
    return chosen, remarks


def _of_step(folder, sets, complete, broken, step):
    def is_of_step(each):
        return step in (each.label, str(each.counters.get("step_num", "")))

    for each in sets:
        if each.name in broken and is_of_step(each):
            raise broken[each.name]
    found = [each for each in complete if is_of_step(each)]
    if not found:
        there = ", ".join(f"{each.label or each.name} (step_num {each.counters.get('step_num', '?')})" for each in sets)
        raise InputError(f"{folder}: no checkpoint of step {step}; there are {there}")
    return max(found, key=RankFiles.age), []

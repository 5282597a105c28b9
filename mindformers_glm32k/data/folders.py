"""Which files of a folder are data: those of its sub-folders too; what is passed over is named."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mindformers_glm32k.errors import InputError

ENDINGS = (".jsonl", ".json", ".parquet")
PACKED = (".gz", ".bz2", ".xz")
_HELD_OUT = "heldout"  # where `glm32k preprocess` puts what no training may see
_TRAIN, _EVAL = {"train", "training"}, {"dev", "test", "val", "valid", "validation", "eval", "evaluation"}


def data_files(folder: Path, for_evaluation: bool = False) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The data files below a folder in the order of their names, and the others with the reason.

    Hidden files are what interrupted programs leave behind, hidden folders caches: neither is looked at. Where a folder
    has both, files named train… and dev…, test… or valid…, only those of the purpose are taken.

    Raises:
        InputError: a folder that cannot be listed.
    """
    found, passed_over = [], []
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        for name in [name for name in folders if name == _HELD_OUT]:
            passed_over.append((Path(parent, name), "held out from training"))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != _HELD_OUT)
        visible = sorted(name for name in names if not name.startswith("."))
        data = [name for name in visible if _plain(name).endswith(ENDINGS)]
        passed_over += [(Path(parent, name), "no data by its name") for name in visible if name not in data]
        splits = {name: _split(name) for name in data}
        if {True, False} <= set(splits.values()):
            other, reason = not for_evaluation, "for training" if for_evaluation else "for evaluation"
            passed_over += [(Path(parent, name), f"{reason}, by its name") for name in data if splits[name] is other]
            data = [name for name in data if splits[name] is not other]
        found += [Path(parent, name) for name in data]
    return sorted(found), passed_over


def _unreadable(error):
    raise InputError(
        f"{error.filename}: cannot be listed ({error.strerror}); mend that, or move it elsewhere"
    ) from error


def is_json_lines(path: Path) -> bool:
    """Whether a file says by its name that it holds one record a line, and nothing but records."""
    return _plain(path.name).endswith(".jsonl")


def _plain(name):
    """The name in lower case, without the ending of a packed file."""
    name = name.lower()
    return next((name[: -len(ending)] for ending in PACKED if name.endswith(ending)), name)


def _split(name):
    """True for data to evaluate with, False for training, None for what does not say."""
    first = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return True if first in _EVAL else False if first in _TRAIN else None

"""Files of predictions, DATASET.jsonl: reading one, and appending to one."""

from __future__ import annotations

from pathlib import Path

from mindformers_glm32k.data.jsonl import parse_line
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.journal import Journal, first_difference


def check_prediction(row: dict, what: str) -> None:
    """Raises InputError, which begins with `what`, where a record lacks a field that scoring needs."""
    wanted = {"pred": str, "answers": list, "all_classes": (list, type(None)), "length": int}
    for name, kind in wanted.items():
        if name not in row or not isinstance(row[name], kind) or isinstance(row[name], bool):
            found = f"is {type(row[name]).__name__}" if name in row else "is missing"
            raise InputError(f"{what}: field {name!r} {found}; predict writes pred, answers, all_classes and length")


def read_predictions(path: Path) -> tuple[list[dict], int, bool]:
    """Reads one file of predictions.

    Returns:
        The records, the number of lines that repeat an `_id` (left out), and whether the last line is incomplete.

    Raises:
        InputError: a line that is no prediction.
    """
    rows, ids, doubles = [], set(), 0
    lines = path.read_bytes().split(b"\n")
    rest = lines.pop()  # after the last line break: nothing, or an incomplete line
    if rest and _is_whole(rest):  # a complete last line without a line break, as other programs may write it
        lines.append(rest)
        rest = b""
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            row = parse_line(raw, first=number == 1)
        except InputError as error:
            raise InputError(f"{path}: line {number}: {error}") from error
        check_prediction(row, f"{path}: line {number}")
        key = row.get("_id")
        if key is not None and key in ids:
            doubles += 1
            continue
        ids.add(key)
        rows.append(row)
    return rows, doubles, bool(rest)


def _is_whole(raw):
    try:
        check_prediction(parse_line(raw), "")
    except InputError:
        return False
    return True


class PredictionFile(Journal):
    """One file of predictions, each line with the stamp of what determines it.

    Args:
        path: the file; made when it is not there.
        stamp: what determines the predictions; lines with another one, or with none, are refused.

    Raises:
        InputError: a damaged line, or one with another stamp.
    """

    def __init__(self, path: Path, stamp: dict):
        self._stamp = stamp
        super().__init__(path, self._checked_key)

    def add(self, key: str, row: dict) -> bool:
        """Appends a row; see `Journal.add`."""
        return super().add(key, {**row, "_id": key, "stamp": self._stamp})

    def _checked_key(self, row):
        try:
            check_prediction(row, "a line")
        except InputError as error:
            raise InputError(f"{error}; move the file away to predict again") from error
        found = row.get("stamp")
        if found != self._stamp:
            hint = "" if isinstance(found, dict) else ": not by `glm32k longbench predict`"
            raise InputError(
                f"has lines that were predicted otherwise ({first_difference(found, self._stamp)}{hint}); "
                "give another --output_dir, or remove the file"
            )
        return str(row["_id"])

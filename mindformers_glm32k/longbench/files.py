"""LongBench's files in a folder or in the published data.zip, line by line."""

from __future__ import annotations

import contextlib
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindformers_glm32k.data.jsonl import raw_lines
from mindformers_glm32k.errors import InputError

OUTPUTS = {True: "longbench_e.jsonl", False: "longbench.jsonl"}  # by is_longbench_e; upstream's names, too
_HINT = "Give the folder of LongBench's .jsonl files, or its data.zip, in --data_path."
_ZIP_ERRORS = (  # RuntimeError: encrypted; the others: damaged names, offsets and streams
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError),
    *(OSError, ValueError, LookupError, OverflowError, struct.error),
)


@dataclass(frozen=True)
class DataFile:
    """One file of LongBench: `path`, or the `member` of that zip file; `size` in bytes, unpacked."""

    path: Path
    member: str | None
    size: int

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def stem(self) -> str:
        """The name without folder and ending."""
        return Path(self.member or self.path).stem

    def lines(self) -> Iterator[tuple[int, bytes | None, int]]:
        """Yields (number from 1, bytes or None, bytes read so far) of each line, as `raw_lines`; InputError where the
        zip file is damaged."""
        with contextlib.ExitStack() as stack:
            try:
                if self.member:
                    archive = stack.enter_context(zipfile.ZipFile(self.path))
                    file = stack.enter_context(archive.open(self.member))
                else:
                    file = stack.enter_context(open(self.path, "rb"))
                for number, raw in raw_lines(file):
                    yield number, raw, file.tell()
            except _ZIP_ERRORS as error:
                what = "cannot be unpacked" if self.member else "cannot be read"
                raise InputError(f"{self}: {what} ({error or type(error).__name__}); get the file again") from error


def find(data_path: str | os.PathLike, is_longbench_e: bool) -> tuple[list[DataFile], list[str]]:
    """The files to read, in the order of their names, and those passed over, with reasons.

    Args:
        data_path: a folder, a zip file, or one .jsonl file.
        is_longbench_e: LongBench-E's files, which end in `_e.jsonl`, or the others.

    Raises:
        InputError: no such path, no zip file, or no file of the kind in it.
    """
    path = Path(data_path)
    if path.is_dir():
        entries = [DataFile(entry, None, entry.stat().st_size) for entry in path.iterdir() if entry.is_file()]
    elif path.suffix == ".zip" and path.is_file():
        entries = _members(path)
    elif path.is_file():
        entries = [DataFile(path, None, path.stat().st_size)]
    else:
        raise InputError(f"--data_path {path}: no such file or folder. {_HINT}")
    taken, passed_over, other_kind = [], [], 0
    for entry in sorted(entries, key=lambda entry: (entry.stem, str(entry))):
        reason = _why_not(entry)
        if reason:
            passed_over.append(f"{entry}: skipped, {reason}")
        elif entry.stem.endswith("_e") == is_longbench_e:
            taken.append(entry)
        else:
            other_kind += 1
    kind, other = ("LongBench-E (*_e.jsonl)", "LongBench") if is_longbench_e else ("LongBench", "LongBench-E")
    if other_kind:
        passed_over.append(
            f"{path}: {other_kind} files of {other} left out; --is_longbench_e {not is_longbench_e} takes them"
        )
    if not taken:
        elsewhere = [entry for entry in (path / "data", path / "data.zip") if entry.exists()]
        near = f"Did you mean {elsewhere[0]}?" if elsewhere and not other_kind else "".join(passed_over[-1:])
        raise InputError(f"--data_path {path}: no files of {kind} in it. {near + '. ' if near else ''}{_HINT}")
    return taken, passed_over


def _members(path):
    try:
        with zipfile.ZipFile(path) as archive:
            return [
                DataFile(path, member.filename, member.file_size)
                for member in archive.infolist()
                if not member.is_dir() and not member.filename.startswith("__MACOSX/")
            ]
    except _ZIP_ERRORS as error:
        raise InputError(f"--data_path {path}: no zip file ({error}). {_HINT}") from error


def _why_not(entry):
    name = Path(entry.member or entry.path).name
    if name in OUTPUTS.values():
        return "this is a name that the output has"
    if name.startswith(".") or not name.endswith(".jsonl"):
        return "not one of LongBench's, which end in .jsonl"
    return "it is empty" if entry.size == 0 else None

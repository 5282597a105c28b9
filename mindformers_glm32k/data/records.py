"""Data files that are not JSON lines: what is certain is written as JSON lines into the cache, and read from there.

Read are gzip, bzip2 and xz; parquet; one JSON array; one object that holds the array of records; objects over several
lines or several in a line; UTF-16 and UTF-32 with a byte order mark; line ends of a carriage return alone. Whatever
else is known by its first bytes is named, with what to do.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import json
import lzma
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindformers_glm32k.data.jsonl import MAX_LINE_BYTES
from mindformers_glm32k.data.line_index import cache_folder, cache_name
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file

_OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
_PARQUET = b"PAR1"
_TO_JSON = "write it as JSON lines: python -c \"import pandas; pandas.{}('{}').to_json('data.jsonl', orient='records', "
_TO_JSON += 'lines=True, force_ascii=False)"'
# First bytes -> what the file is, and what to do; {} is its name.
_KNOWN = (
    (b"PK\x03\x04", "a zip archive (or an Excel file); unpack it: unzip {}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it: 7z x {}"),
    (b"Rar!", "a RAR archive; unpack it: unrar x {}"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it: zstd -d {}"),
    (b"ARROW1", "an Arrow file; write it with datasets: Dataset.from_file('{}').to_json('data.jsonl')"),
    (b"version https://git-lfs", "the pointer of a Git LFS file, not the data; download it: git lfs pull"),
    (b"%PDF", "a PDF, which holds no records"),
    (b"<", "a web page or XML, not records; was the download refused? Download the file itself"),
)
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WHOLE = 2 << 30  # bytes; a larger file is not read into memory
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


def json_lines(
    path: str | os.PathLike, is_record: Callable[[dict], bool], cache_dir: str | os.PathLike | None = None
) -> Path | None:
    """The JSON-lines file of what a data file holds, written when it is not there; None where it is one itself.

    Args:
        path: the data file.
        is_record: whether an object has the fields of a record; what has not may hold the array of them.
        cache_dir: see `cache_folder`.

    Raises:
        InputError: no such file, or one that is known to be something else.
    """
    path = Path(require_file(path, "data file", "Give a file with one JSON object per line."))
    with open(path, "rb") as file:
        head = file.read(1 << 10)
    open_file = next((opener for magic, opener in _OPENERS if head.startswith(magic)), open)
    if head.startswith(_PARQUET):
        return _kept(path, cache_dir, lambda: _parquet(path))
    try:
        with open_file(path, "rb") as file:
            head = file.read(1 << 16)
            file.seek(0)
            first = file.readline(MAX_LINE_BYTES + 1)
    except _BROKEN as error:
        raise InputError(f"{path}: cannot be unpacked ({error}); is the file cut off? Copy or download it again") from (
            error
        )
    _refuse(path, head)
    encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    carriage = encoding is None and b"\n" not in head and b"\r" in head.rstrip()
    if encoding is None and not carriage and _is_line(first, is_record):
        return None if open_file is open else _kept(path, cache_dir, lambda: _unpacked(path, open_file))
    if len(first) > MAX_LINE_BYTES or os.path.getsize(path) > _WHOLE:
        return None if open_file is open else _kept(path, cache_dir, lambda: _unpacked(path, open_file))
    return _rewritten(path, open_file, encoding or "utf-8-sig", is_record, cache_dir)


def _is_line(raw, is_record):
    """Whether the file's first line is a record, or damaged in a way that its text does not explain."""
    try:
        value = json.loads(raw.decode("utf-8-sig").rstrip().rstrip(","))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and (is_record(value) or _array_inside(value) is None)


def _array_inside(value):
    """The one list of objects that an object holds, or None."""
    lists = [one for one in value.values() if isinstance(one, list) and one and all(isinstance(x, dict) for x in one)]
    return lists[0] if len(lists) == 1 else None


def _rewritten(path, open_file, encoding, is_record, cache_dir):
    with open_file(path, "rb") as file:
        raw = file.read()
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:  # named by line
        return None if open_file is open else _kept(path, cache_dir, lambda: iter([raw]))
    try:
        values = list(_values(text))
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "[":
            raise InputError(
                f"{path}: a JSON array that is broken ({error}); is the file cut off? Mend it, or write one object per "
                "line"
            ) from error
        values = None
    if not values:  # damaged: named by line
        plain = open_file is open and encoding == "utf-8-sig" and ("\n" in text if values is None else True)
        return None if plain else _kept(path, cache_dir, lambda: iter([text.replace("\r", "\n").encode()]))
    if len(values) == 1 and isinstance(values[0], dict) and not is_record(values[0]):
        values = _array_inside(values[0]) or values
    records = []
    for value in values:
        if isinstance(value, list) and value and all(_is_message(entry) for entry in value):
            records.append({"messages": value})  # a conversation
        else:
            records += value if isinstance(value, list) else [value]
    return _kept(path, cache_dir, lambda: (_line(record) for record in records))


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and ("role" in entry and "content" in entry or "from" in entry and "value" in entry)


def _values(text):
    """The JSON values of a text, one behind the other; ValueError where it is something else."""
    decoder, place, blank = json.JSONDecoder(), 0, " \t\r\n,\ufeff"
    while True:
        while place < len(text) and text[place] in blank:
            place += 1
        if place == len(text):
            return
        value, place = decoder.raw_decode(text, place)
        if not isinstance(value, (dict, list)):
            raise ValueError(f"a bare {type(value).__name__}")
        yield value


def _refuse(path, head):
    for magic, what in _KNOWN:
        if head.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(magic):
            raise InputError(f"{path}: is {what.format(path.name)}")
    if head[257:262] == b"ustar":
        raise InputError(f"{path}: is a tar archive; unpack it: tar -xf {path.name}")
    suffix = path.name.lower().split(".")[-1]
    if suffix in ("csv", "tsv"):
        read = "read_csv" if suffix == "csv" else "read_table"
        raise InputError(f"{path}: is a table ({suffix.upper()}), not JSON; {_TO_JSON.format(read, path.name)}")
    if head[:64].count(0) >= len(head[:64]) / 4 > 0 and not any(head.startswith(mark) for mark, _ in _MARKS):
        wide, order = head[:2].count(0) == 1, "BE" if head[0] == 0 else "LE"
        raise InputError(
            f"{path}: has zero bytes where text should be; "
            + (
                f"it looks like UTF-16: convert it: iconv -f UTF-16{order} -t UTF-8 {path.name}"
                if wide
                else "it is no text, or was not written whole: give a file with one JSON object per line"
            )
        )


def _unpacked(path, open_file) -> Iterator[bytes]:
    with open_file(path, "rb") as file:
        while True:
            piece = file.read(1 << 20)
            if not piece:
                return
            yield piece


def _parquet(path) -> Iterator[bytes]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: is a parquet file; to read it: pip install pyarrow") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1000):
            for record in batch.to_pylist():
                yield _line(record)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0][:150]
        raise InputError(
            f"{path}: a parquet file that cannot be read ({reason}); is it cut off? Copy or download it again"
        ) from error


def _line(record):
    return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"


def _kept(path, cache_dir, pieces):
    """The file in the cache; those of other states of the data file are removed."""
    folder, name, state = cache_folder(path, cache_dir), cache_name(path), os.stat(path)
    target = folder / f"{name}-{state.st_size}-{state.st_mtime_ns}.records.jsonl"
    if target.exists():
        return target
    for old in folder.glob(f"{glob.escape(name)}-*.records.jsonl"):
        old.unlink(missing_ok=True)
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        try:
            for piece in pieces():
                file.write(piece)
        except _BROKEN as error:
            raise InputError(f"{path}: cannot be read whole ({error}); copy or download it again") from error
    if not target.stat().st_size:
        target.unlink()
        raise InputError(f"data file {path}: there are no records in it")
    shutil.copystat(path, target)
    return target

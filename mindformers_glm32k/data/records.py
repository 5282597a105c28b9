"""Data files that are not JSON lines: known formats are converted to JSON lines in the cache, and read from there.

Supported: gzip, bzip2, xz, zstd and lz4; parquet and Arrow; one JSON array; one object that holds the array of records;
objects over several lines or several in a line; UTF-16 and UTF-32 with a byte order mark; carriage returns alone as
line ends. Other formats that are known by their first bytes are refused with a hint.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindformers_glm32k.checks import UnusableJSON, parse_json, unique_keys
from mindformers_glm32k.data.formats import carries_text
from mindformers_glm32k.data.jsonl import MAX_LINE_BYTES
from mindformers_glm32k.data.line_index import cache_folder, cache_name
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file


def _by_pyarrow(codec):
    """An opener for codecs that the standard library does not have."""

    def opener(path, mode):
        pyarrow = _pyarrow(path, f"compressed by {codec}")
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec))

    return opener


_OPENERS = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
    (b"]\x00\x00", lzma.open),
    (b"\x28\xb5\x2f\xfd", _by_pyarrow("zstd")),
    (b"\x04\x22\x4d\x18", _by_pyarrow("lz4")),
)
_PARQUET, _ARROW = b"PAR1", (b"ARROW1\0\0", b"\xff\xff\xff\xff")
_TO_JSON = "write it as JSON lines: python -c \"import pandas; pandas.{}('{}').to_json('data.jsonl', orient='records', "
_TO_JSON += 'lines=True, force_ascii=False)"'
# First bytes -> what the file is, and what to do; {} is its name.
_KNOWN = (
    (b"PK\x03\x04", "a zip archive (or an Excel file); unpack it: unzip {}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it: 7z x {}"),
    (b"Rar!", "a RAR archive; unpack it: unrar x {}"),
    (b"\x1f\x9d", "compressed by compress; unpack it: uncompress {}"),
    (b"FEA1", "a Feather file; " + _TO_JSON.replace("{}", "read_feather", 1)),
    (b"\xd0\xcf\x11\xe0", "an Excel file; " + _TO_JSON.replace("{}", "read_excel", 1)),
    (b"SQLite format 3", "an SQLite database; write its table as JSON lines"),
    (b"\x89HDF", "an HDF5 file; write it as JSON lines"),
    (b"Obj\x01", "an Avro file; write it as JSON lines"),
    (b"ORC", "an ORC file; " + _TO_JSON.replace("{}", "read_orc", 1)),
    (b"\x93NUMPY", "an array of NumPy, which holds no records"),
    (b"\x80\x02", "a pickle, which is not opened; write it as JSON lines"),
    (b"\x80\x03", "a pickle, which is not opened; write it as JSON lines"),
    (b"\x80\x04", "a pickle, which is not opened; write it as JSON lines"),
    (b"\x80\x05", "a pickle, which is not opened; write it as JSON lines"),
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
_FREELY, _MOST_TIMES = 64 << 20, 100  # against zip bombs: bytes that are always fine; above, the largest ratio
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


def json_lines(
    path: str | os.PathLike,
    is_record: Callable[[dict], bool],
    cache_dir: str | os.PathLike | None = None,
    beside: Callable[[list[str]], Any] = lambda fields: None,
) -> Path | None:
    """The data file converted to JSON lines, in the cache, written if missing; None where it is JSON lines itself.

    Args:
        path: the data file.
        is_record: whether an object has the fields of a record; if not, it may hold an array of records.
        cache_dir: see `cache_folder`.
        beside: called with the names of the fields with text beside that array, which are in no record.

    Raises:
        InputError: no such file, a damaged one, or one of a format that is not supported.
    """
    path = Path(require_file(path, "data file", "Give a file with one JSON object per line."))
    with open(path, "rb") as file:
        head = file.read(1 << 10)
    open_file = next((opener for magic, opener in _OPENERS if head.startswith(magic)), open)
    if head.startswith((_PARQUET, *_ARROW)):
        return _kept(path, cache_dir, lambda: _table(path, path, head))
    try:
        with open_file(path, "rb") as file:
            head = file.read(1 << 16)
        with open_file(path, "rb") as file:
            first = file.readline(MAX_LINE_BYTES + 1)
        if open_file is not open and head.startswith((_PARQUET, *_ARROW)):
            with open_file(path, "rb") as file:
                unpacked = io.BytesIO(b"".join(_pieces(path, file)))
            return _kept(path, cache_dir, lambda: _table(path, unpacked, head))
    except _BROKEN as error:
        raise InputError(f"{path}: cannot be unpacked ({error}); is the file cut off? Copy or download it again") from (
            error
        )
    if open_file is not open and any(head.startswith(magic) for magic, _ in _OPENERS):
        raise InputError(f"{path}: is compressed twice; unpack it once, and give what comes out")
    _refuse(path, head)
    encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    carriage = encoding is None and b"\n" not in head and b"\r" in head.rstrip()
    if encoding is None and not carriage and _is_line(first, is_record):
        return None if open_file is open else _kept(path, cache_dir, lambda: _unpacked(path, open_file))
    if len(first) > MAX_LINE_BYTES or os.path.getsize(path) > _WHOLE:
        return None if open_file is open else _kept(path, cache_dir, lambda: _unpacked(path, open_file))
    return _rewritten(path, open_file, encoding or "utf-8-sig", is_record, cache_dir, beside)


def _is_line(raw, is_record):
    """Whether the file's first line is one of JSON lines: a record, or an object without an array of records."""
    try:
        value = parse_json(raw.decode("utf-8-sig").rstrip().rstrip(","))
    except UnusableJSON:
        return raw.lstrip()[:1] == b"{"  # JsonLines names the line
    except ValueError:
        return False
    return isinstance(value, dict) and (is_record(value) or not _arrays_inside(value))


def _array_inside(value):
    """The only list of objects in an object; None where there are none or several."""
    lists = _arrays_inside(value)
    return next(iter(lists.values())) if len(lists) == 1 else None


def _arrays_inside(value):
    return {
        name: one
        for name, one in value.items()
        if isinstance(one, list) and one and all(isinstance(entry, dict) for entry in one)
    }


def _rewritten(path, open_file, encoding, is_record, cache_dir, beside):
    with open_file(path, "rb") as file:
        raw = b"".join(_pieces(path, file))
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:  # JsonLines names the line
        return None if open_file is open else _kept(path, cache_dir, lambda: iter([raw]))
    try:
        values = list(_values(text))
    except (UnusableJSON, RecursionError) as error:
        raise InputError(f"{path}: {error if isinstance(error, UnusableJSON) else 'brackets nested too deeply'}") from (
            error
        )
    except ValueError as error:
        if text.lstrip()[:1] == "[":
            raise InputError(
                f"{path}: a JSON array that is broken ({error}); is the file cut off? Mend it, or write one object per "
                "line"
            ) from error
        values = None
    if not values:  # damaged: JsonLines names the line
        plain = open_file is open and encoding == "utf-8-sig" and ("\n" in text if values is None else True)
        return None if plain else _kept(path, cache_dir, lambda: iter([text.replace("\r", "\n").encode()]))
    if len(values) == 1 and isinstance(values[0], dict) and not is_record(values[0]):
        inside = _array_inside(values[0])
        if inside is not None:
            beside([name for name, value in values[0].items() if value is not inside and carries_text(value)])
            values = inside
        lists = (
            [repr(name) for name, one in _arrays_inside(values[0]).items() if is_record(one[0])] if not inside else ()
        )
        if len(lists) > 1:
            raise InputError(
                f"{path}: holds {len(lists)} lists of records, {', '.join(lists)}; write each to a file of its own"
            )
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
    """Yields the consecutive JSON objects and arrays of a text; ValueError where it has anything else."""
    decoder, place, blank = json.JSONDecoder(object_pairs_hook=unique_keys), 0, " \t\r\n,\ufeff"
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
        yield from _pieces(path, file)


def _pieces(path, file) -> Iterator[bytes]:
    """Yields the bytes of an open file in chunks; InputError where it unpacks to far more than records would."""
    size, total = os.path.getsize(path), 0
    while True:
        piece = file.read(1 << 20)
        total += len(piece)
        if total > max(_FREELY, _MOST_TIMES * size):
            raise InputError(
                f"{path}: unpacks to more than {_MOST_TIMES} times its {size} bytes; look at what it holds"
            )
        if not piece:
            return
        yield piece


def _pyarrow(path, what):
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"{path}: is {what}; to read it: pip install pyarrow") from error
    return pyarrow


def _table(path, file, head) -> Iterator[bytes]:
    """Yields the records of a parquet or Arrow file (also of save_to_disk of `datasets`) as lines of JSON.

    A struct column has the fields of all records: null fields inside it are left out, because the record had none
    when it was stored.
    """
    pyarrow = _pyarrow(path, "a parquet file" if head.startswith(_PARQUET) else "an Arrow file")
    try:
        for batch in _batches(pyarrow, file, head):
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise InputError(f"{path}: two columns have one name, {max(names, key=names.count)!r}; rename one")
            batch.validate(full=True)  # reading values at offsets out of bounds would crash the process
            if batch.num_rows > 8 * batch.nbytes + 1000:  # columns of nulls have no bytes, however many
                raise ValueError(f"{batch.num_rows} records in {batch.nbytes} bytes")
            for start in range(0, batch.num_rows, 1000):
                for record in batch.slice(start, 1000).to_pylist():
                    yield _line({name: _without_nulls(value) for name, value in record.items()})
    except InputError:
        raise
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        kind = "a parquet" if head.startswith(_PARQUET) else "an Arrow"
        raise InputError(
            f"{path}: {kind} file that cannot be read ({reason}); is it cut off? Copy or download it again"
        ) from error


def _batches(pyarrow, file, head):
    if head.startswith(_PARQUET):
        from pyarrow import parquet

        yield from parquet.ParquetFile(file).iter_batches(1000)
        return
    with contextlib.ExitStack() as opened:
        source = file if isinstance(file, io.BytesIO) else opened.enter_context(pyarrow.OSFile(str(file)))
        if head.startswith(_ARROW[1]):
            yield from pyarrow.ipc.open_stream(source)
            return
        reader = pyarrow.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _without_nulls(value):
    """A column's value without the null fields of its structs."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _line(record):
    return json.dumps(record, ensure_ascii=False, default=_as_text).encode("utf-8", "surrogatepass") + b"\n"


def _as_text(value):
    """Values that JSON does not have: dates and the like as str gives them; bytes decoded where they are UTF-8."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"binary": f"{len(value)} bytes that are no UTF-8"}


def _kept(path, cache_dir, pieces):
    """The file in the cache, written if missing; files of earlier states of the data file are removed."""
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

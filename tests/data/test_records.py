"""Files that are not JSON lines: read where that is certain, else named with what to do."""

import bz2
import gzip
import json
import lzma
import sys

import numpy as np
import pytest

from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.errors import InputError

RECORDS = [{"content": "q\u2028天", "summary": "a"}, {"content": "q2", "summary": "a2"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
PRETTY = json.dumps(RECORDS, indent=2)


def prompts(path):
    source = SampleSource(path)
    return [source[index].prompt for index in range(len(source))]


@pytest.mark.parametrize(
    "name, raw",
    [
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(PRETTY.encode(), mtime=0)),
        ("a.bin", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", PRETTY.encode()),
        ("a.json", b"\xef\xbb\xbf" + PRETTY.encode()),
        ("a.json", json.dumps({"version": 1, "data": RECORDS}).encode()),
        ("a.json", json.dumps({"train": RECORDS}, indent=1).encode()),
        ("a.jsonl", "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode()),
        ("a.jsonl", LINES.replace("\n", "").encode()),
        ("a.jsonl", LINES.replace("\n", ",\n").encode()),
        ("a.jsonl", LINES.replace("\n", "\r").encode()),
        ("a.jsonl", LINES.replace("\n", "\n\ufeff", 1).encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
        ("a.JSONL", LINES.encode()),
    ],
)
def test_what_is_certain_is_read(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    assert prompts(tmp_path / name) == [record["content"] for record in RECORDS]
    assert prompts(tmp_path / name) == [record["content"] for record in RECORDS], "from the cache"
    assert SampleSource(tmp_path / name).files() == [(str(tmp_path / name), "adgen", 2)]


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, chat = tmp_path / "train-00000-of-00001.parquet", [{"from": "human", "value": "q", "weight": None}]
    chat.append({"from": "gpt", "value": "a", "weight": 1})
    parquet.write_table(pyarrow.Table.from_pylist([{"conversations": chat, "system": None}] * 2), path)
    source = SampleSource(tmp_path)
    assert source.files()[0][1:] == ("sharegpt", 2) and source[1].turns()[1].content == "a"
    assert source.location(1) == f"{path}, record 2"
    path.write_bytes(path.read_bytes()[:-20] + b"x" * 16 + b"PAR1")
    with pytest.raises(InputError, match="a parquet file that cannot be read"):
        SampleSource(path)


def test_parquet_values_that_json_has_no_form_for(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    call = {"city": "Oslo", "day": None}  # of another record's call; parquet gives every struct all fields
    tool = {"role": "tool", "name": "f", "parameters": call, "observation": "9"}
    chat = [{"role": "user", "content": "q"}, tool, {"role": "assistant", "content": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat, "image": b"\xff\xd8"}]), tmp_path / "a.parquet")
    source = SampleSource(tmp_path / "a.parquet")
    assert source[0].turns()[1].content == "```python\ntool_call(city='Oslo')\n```"
    assert source.unused()[0].endswith("not used are 'image' of 1 of 1 records; only the fields of the layout chat are")
    binary = pyarrow.table({"content": pyarrow.array([b"q"]), "summary": ["a"]})
    parquet.write_table(binary, tmp_path / "b.parquet")
    assert prompts(tmp_path / "b.parquet") == ["q"]
    parquet.write_table(pyarrow.table({"content": [b"\xff"], "summary": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="record 1: column 'content' is dict .*1 bytes that are no UTF-8"):
        SampleSource(tmp_path / "c.parquet")
    columns = [pyarrow.array([text]) for text in "qab"]
    parquet.write_table(pyarrow.table(columns, names=["content", "summary", "summary"]), tmp_path / "d.parquet")
    with pytest.raises(InputError, match="d.parquet: two columns have one name, 'summary'"):
        SampleSource(tmp_path / "d.parquet")


def test_what_datasets_and_other_compressors_write(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(RECORDS)
    for name, writer in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with pyarrow.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as file, writer(file, table.schema) as out:
            out.write_table(table)
    parquet.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    for codec in ("zstd", "lz4"):
        (tmp_path / f"a.jsonl.{codec}").write_bytes(pyarrow.Codec(codec).compress(LINES.encode(), asbytes=True))
    (tmp_path / "a.jsonl.lzma").write_bytes(lzma.compress(LINES.encode(), format=lzma.FORMAT_ALONE))
    for path in sorted(tmp_path.iterdir()):
        if path.is_file():
            assert prompts(path) == [record["content"] for record in RECORDS], path.name


def test_text_around_the_array_of_records_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"system": "be brief", "version": 1, "data": RECORDS}))
    for _ in range(2):  # the second time from the cache
        assert SampleSource(path).unused() == [f"{path}: not used is what stands around the records: 'system'"]


def test_values_nested_deeper_than_can_be_looked_through(tmp_path):
    deep = b"[" * 900 + b'"t"' + b"]" * 900
    (tmp_path / "a.jsonl").write_bytes(LINES.encode() + b'{"content": "q", "x": ' + deep + b', "summary": "a"}')
    limit = sys.getrecursionlimit()  # MindSpore raises it
    sys.setrecursionlimit(1000)
    try:
        with pytest.raises(InputError, match="a.jsonl: line 3: brackets nested too deeply"):
            SampleSource(tmp_path / "a.jsonl")
    finally:
        sys.setrecursionlimit(limit)


def test_an_array_of_messages_is_a_conversation(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for text in (json.dumps(chat) + "\n", json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])):
        (tmp_path / "a.jsonl").write_text(text * 2)
        source = SampleSource(tmp_path / "a.jsonl")
        assert len(source) == 2 and [turn.content for turn in source[1].turns()] == ["q", "a"]


def test_records_of_a_converted_file_are_named_by_its_own_path(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([RECORDS[0], {"content": "q"}], indent=2))
    with pytest.raises(InputError, match=r"a.json: record 2: column 'summary' is missing"):
        SampleSource(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(PRETTY)  # another state of the file is converted anew
    assert len(SampleSource(tmp_path / "a.json")) == 2
    assert len(list((tmp_path / ".glm32k_cache").glob("*.records.jsonl"))) == 1


@pytest.mark.parametrize(
    "name, raw, message",
    [
        ("a.zip", b"PK\x03\x04" + b"\0" * 60, "a zip archive .*unzip a.zip"),
        ("a.jsonl", b"PK\x03\x04" + b"\0" * 60, "a zip archive .*unzip a.jsonl"),
        ("a.csv", b"content,summary\nq,a\n", "a table \\(CSV\\).*pandas.read_csv\\('a.csv'\\)"),
        ("a.zst", b"\x28\xb5\x2f\xfd" + b"x" * 60, "a.zst: cannot be unpacked .ZSTD.*cut off"),
        ("a.arrow", b"ARROW1\0\0" + b"x" * 60, "an Arrow file that cannot be read.*cut off"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES.encode(), mtime=0), mtime=0), "is compressed twice"),
        ("a.jsonl.Z", b"\x1f\x9d\x90" + b"x" * 60, "uncompress a.jsonl.Z"),
        ("a.xls", b"\xd0\xcf\x11\xe0" + b"x" * 60, "an Excel file.*pandas.read_excel\\('a.xls'\\)"),
        ("a.jsonl", b"SQLite format 3\0" + b"x" * 60, "an SQLite database"),
        ("a.jsonl", b"\x80\x04\x95" + b"x" * 60, "a pickle, which is not opened"),
        ("a.json", json.dumps({"train": RECORDS, "test": RECORDS}).encode(), "2 lists of records, 'train', 'test'"),
        (
            "a.jsonl",
            LINES.encode() + b'{"content": "q", "summary": "a", "summary": "b"}',
            "line 3: key 'summary' is given",
        ),
        (
            "a.json",
            b'[{"content": "q", "content": "r", "summary": "a"}]',
            "key 'content' is given twice, as 'q' and 'r'",
        ),
        ("a.json", b"[" * 99999 + b"]" * 99999, "nested too deeply"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "a web page"),
        ("a.jsonl", LINES.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8 a.jsonl"),
        ("a.jsonl", '{"content": "金属", "summary": "锡"}\n'.encode("gbk"), "line 1: not UTF-8.*GB18030"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-30], "cut off"),
        ("a.jsonl", b"{'content': 'q', 'summary': 'a'}\n", "line 1: .*a Python dict, not JSON"),
        ("a.json", PRETTY[:-20].encode(), "a JSON array that is broken .*cut off"),
        ("a.jsonl", PRETTY[1:-20].strip().encode(), "the object runs over several lines"),
        ("a.jsonl", LINES.encode() + LINES.replace("\n", "").encode(), "line 3: .*several objects in one line"),
        ("a.jsonl", LINES.encode() + b"\0" * 40, "line 3: .*zero bytes"),
        ("a.json.gz", gzip.compress(b'{"a": 1}\n', mtime=0), "a.json.gz: record 1: has the fields 'a'"),
    ],
)
def test_what_is_not_read_is_named_with_what_to_do(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=message) as error:
        SampleSource(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


# --- files that would take the process's memory, or end it ---


def test_arrow_offsets_outside_the_values(tmp_path):
    """pyarrow reads there without looking, and the process ends."""
    pyarrow = pytest.importorskip("pyarrow")
    feather = pytest.importorskip("pyarrow.feather")
    table = pyarrow.table({"content": ["q" * 100] * 3, "summary": ["a"] * 3})
    feather.write_feather(table, tmp_path / "a.arrow", compression="uncompressed")
    raw = (tmp_path / "a.arrow").read_bytes()
    offsets = np.array([0, 100, 200, 300], "<i4").tobytes()
    assert raw.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(raw.replace(offsets, np.array([0, 100, 1 << 30, 300], "<i4").tobytes()))
    with pytest.raises(InputError, match="a.arrow: an Arrow file that cannot be read"):
        SampleSource(tmp_path / "a.arrow")


def test_a_column_of_nulls_without_end(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    batch = pyarrow.RecordBatch.from_arrays([pyarrow.nulls(1 << 24)], ["content"])
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    assert (tmp_path / "a.arrow").stat().st_size < 2000
    with pytest.raises(InputError, match=f"{1 << 24} records in 0 bytes"):
        SampleSource(tmp_path / "a.arrow")


@pytest.mark.parametrize("start", [b"[\n", b'{"content": "q", "summary": "a"}\n'])
def test_a_small_file_that_unpacks_to_a_huge_one(start, tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(80):
            file.write(b" " * (1 << 20))
    with pytest.raises(InputError, match="a.jsonl.gz: unpacks to more than 100 times its"):
        SampleSource(tmp_path / "a.jsonl.gz")
    assert not list(tmp_path.rglob("*.records.jsonl"))

"""The index of lines: odd files, stale and damaged indexes."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from mindformers_glm32k.data import line_index as index_module
from mindformers_glm32k.data.line_index import LineIndex, cache_folder, cache_name
from mindformers_glm32k.errors import InputError


def lines_of(index):
    content = index.path.read_bytes()
    return [content[slice(*index[number])].strip() for number in range(len(index))]


def expected(content):
    """The plain way: (number from 1, line) of each line that is not white space."""
    return [(number, line.strip()) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def check(path, content, **options):
    path.write_bytes(content)
    index = LineIndex(path, **options)
    found = [(index.line(number), line) for number, line in enumerate(lines_of(index))]
    assert found == expected(content)
    blank = [number for number, line in enumerate(content.split(b"\n"), 1) if not line.strip()]
    assert index.blank.tolist() == [number for number in blank if number < found[-1][0]]
    return index


@pytest.mark.parametrize("stored_from", [0, 1 << 30], ids=["on disk", "in memory"])
@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"b": 2}\n',
        b'{"a": 1}\n{"b": 2}',
        b'{"a": 1}\r\n{"b": 2}\r\n',
        b'\xef\xbb\xbf{"a": 1}\n{"b": 2}\n',
        b'\n\n{"a": 1}\n \t\n\r\n {"b": 2}\n\n',
        b"x",
        b"x\n",
        b" x",
        b"\n x \n \n\n",
    ],
    ids=["plain", "no last newline", "crlf", "byte order mark", "empty lines", "one byte", "one", "space", "mixed"],
)
def test_odd_files(tmp_path, content, stored_from):
    check(tmp_path / "data.jsonl", content, stored_from=stored_from)


@settings(max_examples=200, deadline=None)
@given(
    strategies.lists(strategies.sampled_from([b"\n", b" ", b"\r\n", b"ab", b"{", b"\t", b"c\n"]), min_size=1),
    strategies.integers(1, 7),
)
def test_blocks_of_any_size_give_the_same_index(tmp_path_factory, parts, block):
    content = b"".join(parts)
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    old, index_module._BLOCK = index_module._BLOCK, block
    try:
        if content.strip():
            check(path, content, stored_from=0)
        else:
            path.write_bytes(content)
            with pytest.raises(InputError, match="only empty lines"):
                LineIndex(path, stored_from=0)
    finally:
        index_module._BLOCK = old


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(b'{"n": %d}\n' % number for number in range(1000)))
    return path


def test_it_is_built_once_and_mapped(data, monkeypatch):
    first = LineIndex(data, stored_from=0)
    assert isinstance(first._starts, np.memmap) and first.stored.parent == data.parent / ".glm32k_cache"
    monkeypatch.setattr(index_module, "_scan", None)  # would fail if it were called
    again = LineIndex(data, stored_from=0)
    assert lines_of(again) == lines_of(first) and len(again) == 1000
    copy = pickle.loads(pickle.dumps(again))
    assert lines_of(copy) == lines_of(first)
    assert len(pickle.dumps(again)) < 2000
    assert first.sizes([0, 999]).tolist() == [len(b'{"n": 0}\n'), len(b'{"n": 999}\n')]


def test_a_changed_file_is_indexed_anew(data):
    LineIndex(data, stored_from=0)
    state = os.stat(data)
    content = data.read_bytes()
    data.write_bytes(content + b'{"n": 1000}\n')
    os.utime(data, ns=(state.st_atime_ns, state.st_mtime_ns))  # another size, the same time
    assert len(LineIndex(data, stored_from=0)) == 1001
    data.write_bytes(content.replace(b'}\n{"n": 1}', b',    "": 1}', 1))
    os.utime(data, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert len(LineIndex(data, stored_from=0)) == 999


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-8],
        lambda raw: raw[:20],
        lambda raw: b"",
        lambda raw: raw[:100] + bytes([raw[100] ^ 1]) + raw[101:],
        lambda raw: raw[:300] + bytes([raw[300] ^ 1]) + raw[301:],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: b"X" + raw[1:],
        lambda raw: raw + b"\0" * 8,
    ],
    ids=["shorter", "half a header", "empty", "one bit of the header", "one bit", "the last bit", "no index", "longer"],
)
def test_a_damaged_index_is_rebuilt(data, damage):
    good = LineIndex(data, stored_from=0)
    lines, raw = lines_of(good), good.stored.read_bytes()
    good.stored.unlink()  # the old one stays mapped
    good.stored.write_bytes(damage(raw))
    assert lines_of(LineIndex(data, stored_from=0)) == lines
    assert good.stored.read_bytes() == raw


def test_small_files_leave_no_index(data):
    LineIndex(data)
    assert not (data.parent / ".glm32k_cache").exists()


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data" / "data.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    return path


def test_beside_the_data(data_file):
    assert cache_folder(data_file) == data_file.parent / ".glm32k_cache" == cache_folder(data_file)
    assert (data_file.parent / ".glm32k_cache" / ".gitignore").read_text() == "*\n"


def test_where_the_user_says(data_file, tmp_path):
    assert cache_folder(data_file, tmp_path / "my" / "cache") == tmp_path / "my" / "cache"
    assert (tmp_path / "my" / "cache").is_dir() and not list((tmp_path / "my" / "cache").iterdir())
    assert not (data_file.parent / ".glm32k_cache").exists()


def test_in_the_output_folder_where_the_data_cannot_be_written_to(data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.delenv("LOCAL_DEFAULT_PATH", raising=False)
    assert cache_folder(data_file).resolve() == tmp_path / "output" / "temporary" / "glm32k_cache"
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "elsewhere"))
    assert cache_folder(data_file) == tmp_path / "elsewhere" / "temporary" / "glm32k_cache"


def test_names_differ_by_path_and_parts(data_file, tmp_path):
    other = tmp_path / "data.jsonl"
    names = {
        cache_name(data_file),
        cache_name(other),
        cache_name(data_file, "a"),
        cache_name(data_file, "a", "b"),
        cache_name(data_file, "ab"),
    }
    assert len(names) == 5 and all(name.startswith("data.jsonl-") for name in names)
    assert cache_name(data_file) == cache_name(data_file.parent / ".." / "data" / "data.jsonl")

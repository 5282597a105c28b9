"""Folders of data: what is read, and what is passed over."""

import gzip
import json
import os
import resource

import pytest

from mindformers_glm32k.data.folders import data_files
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.errors import InputError

LINE = json.dumps({"content": "q", "summary": "a"}) + "\n"


def test_mixtures_with_sub_folders_are_read_and_the_rest_is_named(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "heldout").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.jsonl", "B.JSONL", "c.json", "sub/deep/d.jsonl", "heldout/e.jsonl", ".hidden/f.jsonl", ".g.jsonl"):
        (tmp_path / name).write_text(LINE)
    (tmp_path / "h.json.gz").write_bytes(gzip.compress(f"[{LINE}]".encode()))
    (tmp_path / "dataset_info.json").write_text('{"a": {"file_name": "a.jsonl"}}')
    (tmp_path / "i.csv").write_text("content,summary\n")
    source = SampleSource(tmp_path)
    read = [path[len(str(tmp_path)) + 1 :] for path, _, _ in source.files()]
    assert read == ["B.JSONL", "a.jsonl", "c.json", "h.json.gz", "sub/deep/d.jsonl"] and len(source) == 5
    [line] = source.left_out()
    assert line.startswith("3 files are passed over") and "i.csv (no data by its name)" in line
    assert "heldout (held out from training)" in line and "dataset_info.json (" in line and "has the fields 'a'" in line


def test_files_for_evaluation_are_not_trained_on(tmp_path):
    for name in ("train.json", "dev.json", "more.jsonl"):
        (tmp_path / name).write_text(LINE)
    found, passed_over = data_files(tmp_path)
    assert [path.name for path in found] == ["more.jsonl", "train.json"] and len(passed_over) == 1
    assert [path.name for path in data_files(tmp_path, for_evaluation=True)[0]] == ["dev.json", "more.jsonl"]
    (tmp_path / "train.json").unlink()
    assert [path.name for path in data_files(tmp_path)[0]] == ["dev.json", "more.jsonl"], "a folder of tests alone"


def test_a_folder_without_data_says_why(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "b.json").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="found a.zip: no data by its name; b.json: is a zip archive"):
        SampleSource(tmp_path)


def test_more_files_than_a_process_may_open(tmp_path):
    for number in range(300):
        (tmp_path / f"{number:03}.jsonl").write_text(LINE.replace("q", f"q{number}"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    already_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (already_open + 100, limits[1]))
    try:
        source = SampleSource(tmp_path)
        assert [source[index].prompt for index in range(300)] == [f"q{number}" for number in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_text(LINE)
    whole = os.scandir

    def refusing(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="sub: cannot be listed .Permission denied"):
        data_files(tmp_path)

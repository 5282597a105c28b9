"""Where derived files are kept."""

import os

import pytest

from mindformers_glm32k.data.cache_folder import cache_folder, cache_name


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data" / "data.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    return path


def test_beside_the_data(data):
    assert cache_folder(data) == data.parent / ".glm32k_cache" == cache_folder(data)
    assert (data.parent / ".glm32k_cache" / ".gitignore").read_text() == "*\n"


def test_where_the_user_says(data, tmp_path):
    assert cache_folder(data, tmp_path / "my" / "cache") == tmp_path / "my" / "cache"
    assert (tmp_path / "my" / "cache").is_dir() and not list((tmp_path / "my" / "cache").iterdir())
    assert not (data.parent / ".glm32k_cache").exists()


def test_in_the_output_folder_where_the_data_cannot_be_written_to(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.delenv("LOCAL_DEFAULT_PATH", raising=False)
    assert cache_folder(data).resolve() == tmp_path / "output" / "temporary" / "glm32k_cache"
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "elsewhere"))
    assert cache_folder(data) == tmp_path / "elsewhere" / "temporary" / "glm32k_cache"


def test_names_differ_by_path_and_parts(data, tmp_path):
    other = tmp_path / "data.jsonl"
    names = {
        cache_name(data),
        cache_name(other),
        cache_name(data, "a"),
        cache_name(data, "a", "b"),
        cache_name(data, "ab"),
    }
    assert len(names) == 5 and all(name.startswith("data.jsonl-") for name in names)
    assert cache_name(data) == cache_name(data.parent / ".." / "data" / "data.jsonl")

import os
import stat

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, can_be_written, copy_atomically, require_file


def test_the_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder" / "curve.csv"
    with atomic_path(target) as temporary:
        temporary.write_text("1,2\n")
        assert not target.exists()
        assert temporary.parent == target.parent and temporary.suffix == ".csv"
    assert target.read_text() == "1,2\n"
    assert os.listdir(target.parent) == ["curve.csv"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "model.ckpt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(str(target)) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.ckpt"]


def test_the_old_file_is_replaced(tmp_path):
    target = tmp_path / "answers.txt"
    target.write_text("old and longer")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_two_writers_do_not_meet(tmp_path):
    target = tmp_path / "index.json"
    with atomic_path(target) as first, atomic_path(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the one that ended last
    assert os.listdir(tmp_path) == ["index.json"]


def test_a_copy_is_whole_or_not_there(tmp_path):
    (tmp_path / "source").write_text("all of it")
    copy_atomically(tmp_path / "source", tmp_path / "new" / "target")
    assert (tmp_path / "new" / "target").read_text() == "all of it"
    with pytest.raises(FileNotFoundError):
        copy_atomically(tmp_path / "none", tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["new", "source"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_require_file_returns_the_path(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n")
    assert require_file(str(tmp_path / "data.jsonl"), "data file", "hint") == tmp_path / "data.jsonl"


@pytest.mark.parametrize(
    "name, found",
    [
        (None, "data file: no path given"),
        ("", "data file: no path given"),
        ("none.jsonl", "none.jsonl: no such file"),
        ("folder", "folder: is a folder, a file is needed"),
        ("empty.jsonl", "empty.jsonl: the file is empty"),
    ],
)
def test_require_file_says_what_is_wrong(name, found):
    os.mkdir("folder")
    open("empty.jsonl", "w", encoding="utf-8").close()
    with pytest.raises(InputError) as refusal:
        require_file(name, "data file", "Give one.")
    assert found in str(refusal.value) and str(refusal.value).endswith("Give one.")


def test_folders_that_take_files(tmp_path):
    assert can_be_written(tmp_path) and can_be_written(tmp_path / "new" / "newer")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for path in ("file", "file/below", "dangling/below"):
        assert not can_be_written(tmp_path / path)

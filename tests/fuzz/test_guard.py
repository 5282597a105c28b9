"""The guard sees what it is for: known-bad readers."""

import os
import pickle
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz.guard import watched


@pytest.mark.parametrize(
    "action, event",
    [
        (lambda folder: subprocess.run([sys.executable, "-c", ""], check=False), "subprocess.Popen"),
        (lambda folder: os.system("true"), "os.system"),
        (lambda folder: exec("1"), "exec"),
        (lambda folder: eval("1"), "compile"),
        (lambda folder: pickle.loads(b"cos\ngetpid\n."), "pickle.find_class"),
        (lambda folder: (folder.parent / "out.txt").write_text("a"), "open"),
        (lambda folder: (folder / ".." / "new").mkdir(), "os.mkdir"),
        (lambda folder: (folder / "in.txt").rename(folder.parent / "moved.txt"), "os.rename"),
        (lambda folder: (folder / "link" / "a").write_text("a"), "open"),
        (lambda folder: (folder.parent / "victim.txt").unlink(), "os.remove"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_allowed_is_seen(action, event, tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "in.txt").write_text("a")
    (tmp_path / "victim.txt").write_text("a")
    (folder / "link").symlink_to(tmp_path)
    with watched(folder) as found:
        action(folder)
    assert any(one.startswith(event) for one in found), found
    with watched(tmp_path) as found:
        (folder / "b.txt").write_text("a")
        (folder / "b.txt").replace(tmp_path / "c.txt")
        (tmp_path / "c.txt").read_bytes()
    assert not found


BEYOND = """
from tests.fuzz.guard import memory_bound
with memory_bound(64 << 20):
    bytearray(16 << 20)
    try:
        bytearray(256 << 20)
    except MemoryError:
        print("refused")
bytearray(256 << 20)
"""


def test_memory_beyond_the_bound_is_an_error():
    done = subprocess.run(
        [sys.executable, "-c", BEYOND], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "refused\n"

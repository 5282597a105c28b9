"""A killed conversion starts again and ends in the same bytes; until then no output is to be seen."""

import random
import signal
import subprocess
import sys
import time

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import Busy, lock_file
from mindformers_glm32k.weights import conversion, convert, writer

from .synthetic import TINY, chatglm_shapes, random_values, write_folder

# Each group of tensors is slowed down, so that the kill meets the conversion at work.
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from mindformers_glm32k.weights import convert, writer
write, verify = writer._write_group, writer.CheckpointWriter._verify
writer._write_group = lambda *args: (time.sleep(0.01), write(*args))[1]
writer.CheckpointWriter._verify = lambda *args: (time.sleep(0.1), verify(*args))[1]
print("ready", flush=True)
convert({source!r}, {output!r}, max_shard_size="100KB")
"""


@pytest.fixture
def source(tmp_path):
    write_folder(tmp_path / "hf", TINY, random_values(chatglm_shapes(TINY), "fp16"), "bin")
    return tmp_path / "hf"


def outputs(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".ckpt", ".json") and not path.name.endswith("report.json")
    }


def test_kill_at_random_points_then_start_again(source, tmp_path):
    from conftest import ROOT

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    convert(source, undisturbed / "out.ckpt", max_shard_size="100KB")
    program = SLOW.format(root=str(ROOT), source=str(source), output=str(disturbed / "out.ckpt"))
    dice, killed = random.Random(0), 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(dice.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        seen = outputs(disturbed) if disturbed.exists() else {}
        assert seen == {} or seen == outputs(undisturbed)
    assert killed >= 3
    convert(source, disturbed / "out.ckpt", max_shard_size="100KB")
    assert outputs(disturbed) == outputs(undisturbed) and len(outputs(disturbed)) > 3
    assert not [path for path in disturbed.iterdir() if path.name.startswith(".")]


class _Killed(BaseException):
    """Stands for the kill: no `except Exception` may clean up after it."""


@pytest.fixture
def interrupted(source, tmp_path, monkeypatch):
    """What a kill in the middle of writing leaves: half of the output in the work folder, which nothing cleaned up."""

    def stop(*args):
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "finish", stop)
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        with pytest.raises(_Killed):
            convert(source, tmp_path / "out.ckpt", workers=1)
    assert not (tmp_path / "out.ckpt").exists() and not (tmp_path / "out.report.json").exists()
    return tmp_path / ".out.ckpt.work"


@pytest.mark.parametrize("change", ("nothing", "options", "file"))
def test_what_a_kill_left_is_not_gone_on_with(source, tmp_path, interrupted, change):
    """Not even when it looks complete: after a power failure bytes may be missing that never reached the disk."""
    partial = interrupted / "out.ckpt"
    assert partial.stat().st_size > 500_000
    with open(partial, "rb+") as handle:
        handle.seek(5000)
        handle.write(b"\0" * 100)
    (interrupted / "out-00001-of-00002.ckpt").write_bytes(b"of another attempt")
    if change == "file":
        partial.unlink()
    options = {"dtype": "bf16"} if change == "options" else {}
    convert(source, tmp_path / "out.ckpt", **options)
    convert(source, tmp_path / "whole.ckpt", **options)
    assert (tmp_path / "out.ckpt").read_bytes() == (tmp_path / "whole.ckpt").read_bytes()
    assert not interrupted.exists() and not list(tmp_path.glob("*-of-*"))


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_group", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out.ckpt")
    assert sorted(tmp_path.iterdir()) == before


def test_bytes_lost_before_the_end_are_found_out(source, tmp_path, monkeypatch):
    """Every tensor is read back: what is damaged between writing and the end is not published."""
    verify = writer.CheckpointWriter._verify

    def damaged(self, *args):
        with open(self.folder / "out.ckpt", "rb+") as handle:
            handle.seek(5000)
            handle.write(b"\0" * 100)
        verify(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "_verify", damaged)
        with pytest.raises(InputError, match="reads back differently.*try again"):
            convert(source, tmp_path / "out.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert(source, tmp_path / "out.ckpt")
    convert(source, tmp_path / "whole.ckpt")
    assert (tmp_path / "out.ckpt").read_bytes() == (tmp_path / "whole.ckpt").read_bytes()


@pytest.mark.parametrize("change", ("nothing", "options", "source", "output"))
def test_a_finished_conversion_is_reused_only_when_nothing_changed(source, tmp_path, monkeypatch, change):
    import os

    convert(source, tmp_path / "out.ckpt", reuse=True)
    if change == "source":
        os.utime(source / "pytorch_model-00001-of-00002.bin", ns=(1, 1))
    elif change == "output":
        (tmp_path / "out.ckpt").write_bytes((tmp_path / "out.ckpt").read_bytes()[:-1])
    runs, write = [], conversion._write
    monkeypatch.setattr(conversion, "_write", lambda *args: (runs.append(1), write(*args))[1])
    convert(source, tmp_path / "out.ckpt", reuse=True, **({"dtype": "bf16"} if change == "options" else {}))
    assert len(runs) == (change != "nothing")


def test_two_at_once_are_refused(source, tmp_path):
    lock = tmp_path / ".out.ckpt.work.lock"
    with lock_file(lock):
        with pytest.raises(Busy, match="another process is writing this output"):
            convert(source, tmp_path / "out.ckpt")
        assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == [lock.name]
    convert(source, tmp_path / "out.ckpt")  # the file is there, nobody holds it
    assert not lock.exists()

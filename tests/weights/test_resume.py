"""A killed conversion goes on where it stopped and ends in the same bytes; until then no output is to be seen."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import Busy, lock_file
from mindformers_glm32k.weights import convert, job

from .synthetic import TINY, chatglm_shapes, random_values, write_folder

# Each group of tensors is slowed down, so that the kill meets the conversion at work.
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from mindformers_glm32k.weights import job
from mindformers_glm32k.weights import convert
from mindformers_glm32k.files import Busy, lock_file
write, verify = job.Job._write_group, job.Job._verify
job.Job._write_group = lambda *args: (time.sleep(0.01), write(*args))[1]
job.Job._verify = lambda *args: (time.sleep(0.1), verify(*args))[1]
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


def test_kill_at_random_points_then_resume(source, tmp_path):
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
    assert (disturbed / ".out.ckpt.partial" / "journal").stat().st_size > 0 or outputs(disturbed)
    convert(source, disturbed / "out.ckpt", max_shard_size="100KB")
    assert outputs(disturbed) == outputs(undisturbed) and len(outputs(disturbed)) > 3
    assert not (disturbed / ".out.ckpt.partial").exists()


class _Killed(BaseException):
    """Stands for the kill: no `except Exception` may clean up after it."""


def _stop_after(monkeypatch, count):
    """Lets `count` groups be written, then stops as a kill would; returns the list of groups written."""
    written, write = [], job.Job._write_group

    def counted(self, group, *args):
        if len(written) == count:
            raise _Killed
        done = write(self, group, *args)
        written.append(group.targets[0].name)
        return done

    monkeypatch.setattr(job.Job, "_write_group", counted)
    return written


def test_finished_work_is_not_done_again(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "whole.ckpt")
    with monkeypatch.context() as patch:
        first = _stop_after(patch, 9)
        with pytest.raises(_Killed):
            convert(source, tmp_path / "out.ckpt", workers=1)
    assert not (tmp_path / "out.ckpt").exists() and not (tmp_path / "out.report.json").exists()
    with monkeypatch.context() as patch:
        second = _stop_after(patch, 1000)
        convert(source, tmp_path / "out.ckpt", workers=1)
    assert len(first) == 9 and len(second) == 24 - 9 and not set(first) & set(second)
    assert (tmp_path / "out.ckpt").read_bytes() == (tmp_path / "whole.ckpt").read_bytes()


@pytest.mark.parametrize("change", ("options", "source", "journal", "file"))
def test_what_does_not_fit_is_done_again(source, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        _stop_after(patch, 9)
        with pytest.raises(_Killed):
            convert(source, tmp_path / "out.ckpt", workers=1)
    partial, options, again = tmp_path / ".out.ckpt.partial", {}, 24
    if change == "options":
        options = {"dtype": "bf16"}
    elif change == "source":
        shard = source / "pytorch_model-00001-of-00002.bin"
        os.utime(shard, ns=(1, 1))
    elif change == "journal":  # the kill came in the middle of a line
        data = (partial / "journal").read_bytes()
        (partial / "journal").write_bytes(data[:-20])
        again = 24 - 8
    else:
        (partial / "out.ckpt").unlink()
    with monkeypatch.context() as patch:
        second = _stop_after(patch, 1000)
        convert(source, tmp_path / "out.ckpt", workers=1, **options)
    assert len(second) == again
    convert(source, tmp_path / "whole.ckpt", **options)
    assert (tmp_path / "out.ckpt").read_bytes() == (tmp_path / "whole.ckpt").read_bytes()


def test_a_partial_that_lost_data_is_found_out(source, tmp_path, monkeypatch):
    """After a power failure the journal may know of bytes that never reached the disk."""
    with monkeypatch.context() as patch:
        _stop_after(patch, 9)
        with pytest.raises(_Killed):
            convert(source, tmp_path / "out.ckpt", workers=1)
    partial = tmp_path / ".out.ckpt.partial" / "out.ckpt"
    with open(partial, "rb+") as handle:
        handle.seek(5000)
        handle.write(b"\0" * 100)
    with pytest.raises(InputError, match="reads back differently.*convert again"):
        convert(source, tmp_path / "out.ckpt")
    convert(source, tmp_path / "out.ckpt")
    convert(source, tmp_path / "whole.ckpt")
    assert (tmp_path / "out.ckpt").read_bytes() == (tmp_path / "whole.ckpt").read_bytes()


def test_two_at_once_are_refused(source, tmp_path):
    lock = tmp_path / ".out.ckpt.partial.lock"
    with lock_file(lock):
        with pytest.raises(Busy, match="another process is writing this output"):
            convert(source, tmp_path / "out.ckpt")
        assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == [lock.name]
    convert(source, tmp_path / "out.ckpt")  # the file is there, nobody holds it
    assert not lock.exists()

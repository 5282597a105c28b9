"""Runs of the tiny YAML that are killed, interrupted, and whose disk fills; each in a process and a folder of its own.

The short ones are in every suite. `-m slow` adds twenty kills of one process and of two, a worker that dies, and a disk
that fills at random moments.
"""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, launchers_environment

from mindformers_glm32k.training.saved import read_meta, saved_files
from mindformers_glm32k.weights.checkpoint import first_bad_tensor

CONFIG = ROOT / "research" / "glm32k" / "finetune_glm32k_tiny_cpu.yaml"
RECORDS, BATCH, EPOCHS = 40, 8, 6
STEPS = RECORDS // BATCH * EPOCHS
LONG = {"runner_config__epochs": 20, "lr_schedule__total_steps": RECORDS // BATCH * 20}  # for kills every few steps
TIMEOUT = 900  # seconds; a run takes about 15 on a quiet machine


class Folder:
    """Where runs of one training follow each other."""

    def __init__(self, path, data):
        self.path, self.data = path, data
        path.mkdir(parents=True, exist_ok=True)
        self.environment = launchers_environment()
        self.ranks = path / "output" / "checkpoint"
        self.logs = 0

    def options(self, changes):
        values = {
            "train_dataset_dir": self.data[0],
            "train_dataset.tokenizer.vocab_file": self.data[1],
            "train_dataset.max_source_length": 32,
            "model.model_config.padded_vocab_size": 512,
            "lr_schedule.total_steps": STEPS,
            "runner_config.epochs": EPOCHS,
            "callbacks.2.save_checkpoint_steps": 3,
            **changes,
        }
        return ["--config", CONFIG, "--run_mode", "finetune", *(f"--{key}={value}" for key, value in values.items())]

    def start(self, processes=1, **changes):
        """A started run; its output goes to a file of its own."""
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        command = [sys.executable, "-m", "mindformers_glm32k.run_mindformer", *map(str, self.options(changes))]
        if processes > 1:
            changes = {"use_parallel": True, "batch_size": BATCH // processes, **changes}
            order = " ".join(["run_mindformer.py", *(f"'{word}'" for word in map(str, self.options(changes)))])
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            script = ROOT / "scripts" / "msrun_launcher.sh"
            command = ["bash", str(script), order, str(processes), str(port), "msrun_log", "True", "300"]
        self.logs += 1
        self.log = self.path / f"log{self.logs}.txt"
        with open(self.log, "wb") as log:
            # as from a terminal: the children of a background job would ignore SIGINT
            return subprocess.Popen(
                command,
                cwd=self.path,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def run(self, **options):
        """Runs to the end; the exit status."""
        process = self.start(**options)
        try:
            return process.wait(TIMEOUT)
        finally:
            process.kill()

    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def error(self):
        """The one line of an error."""
        (line,) = [line for line in self.text().splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.text()
        return line

    def rows(self):
        """The curve, as far as it is written."""
        path = self.path / "output" / "loss_curve.csv"
        if not path.is_file():
            return []
        with open(path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def wait_for_steps(self, process, more):
        """Waits until the run has written some rows of its own."""
        last, seen, end = self.rows()[-1:], 0, time.monotonic() + TIMEOUT
        while process.poll() is None and seen < more:
            assert time.monotonic() < end, self.text()[-2000:]
            time.sleep(0.02)
            rows = self.rows()
            if rows[-1:] != last:
                last, seen = rows[-1:], seen + 1

    def files(self, rank=0):
        folder = self.ranks / f"rank_{rank}"
        return sorted(path.name for path in folder.glob("*.ckpt")) if folder.is_dir() else []

    def resume(self):
        """The options of a resume; none before the first checkpoint."""
        return {"load_checkpoint": "output", "resume_training": True} if any(self.ranks.rglob("*.ckpt")) else {}

    def complete(self, ranks=1):
        """Steps of the checkpoints that every rank has, whole and finite."""
        steps = []
        for rank in range(ranks):
            found = saved_files(self.ranks / f"rank_{rank}", f"glm32k_rank_{rank}", "ckpt")
            steps.append({step for path, step in found if step > 0 and first_bad_tensor(path) is None})
        return set.intersection(*steps)


@pytest.fixture(scope="module")
def data(small_vocab_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(RECORDS):
            text = " ".join("".join(rng.choices("abcdefgh", k=3)) for _ in range(4))
            file.write(json.dumps({"content": text, "summary": text[:3]}) + "\n")
    return path, small_vocab_file


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing happens to."""
    folder = Folder(tmp_path_factory.mktemp("whole"), data)
    assert folder.run() == 0, folder.text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def long_whole(data, tmp_path_factory):
    """A longer one."""
    folder = Folder(tmp_path_factory.mktemp("long_whole"), data)
    assert folder.run(**LONG) == 0, folder.text()[-3000:]
    return folder


def weights(folder, rank=0):
    name = read_meta(folder.ranks / f"rank_{rank}")["last_ckpt_file"]
    found = ms.load_checkpoint(str(folder.ranks / f"rank_{rank}" / name))
    return {name: value.asnumpy() for name, value in found.items()}


def losses(folder):
    return [(row["step"], row["loss"], row["learning_rate"]) for row in folder.rows()]


def assert_bit_equal(folder, whole):
    assert losses(folder) == losses(whole)
    one, other = weights(folder), weights(whole)
    assert sorted(one) == sorted(other) and len(one) > 40
    for name, values in one.items():
        assert np.array_equal(values, other[name]), name


def kill_many(folder, kills, rng, processes=1):
    """Kills a training again and again, goes on each time, and lets it end. Returns the kills that fell into a save."""
    in_a_save = 0
    options = {**LONG, "callbacks__2__save_checkpoint_steps": 1, "callbacks__2__keep_checkpoint_max": 1}
    for number in range(kills):
        process = folder.start(processes, **options, **folder.resume())
        # a step's row is there before its checkpoint: with two rows the first checkpoint is complete
        folder.wait_for_steps(process, rng.randint(1, 3) + (number == 0))
        if rng.random() < 0.5:  # in the middle of a save, as far as one can see it
            end = time.monotonic() + 5
            while not any(folder.ranks.glob("rank_*/.saving")) and time.monotonic() < end and process.poll() is None:
                pass
        else:
            time.sleep(rng.random() / 5)
        assert process.poll() is None, folder.text()[-3000:]
        if processes == 1:
            process.kill()
        else:
            for pid in workers(folder):
                kill_if_there(pid)
        process.wait(TIMEOUT)
        in_a_save += any(folder.ranks.glob("rank_*/.saving"))
        complete = folder.complete(processes)
        assert complete, folder.files()
        assert len(folder.rows()) - 1 <= max(complete) <= len(folder.rows())  # no checkpoint is ahead of the curve
    assert folder.run(processes=processes, **options, **folder.resume()) == 0, folder.text()[-3000:]
    return in_a_save


def workers(folder, rank=None):
    """Processes of the workers that run in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "environ").read_bytes().split(b"\0")
            here = Path(os.readlink(path / "cwd")) == folder.path
        except OSError:
            continue
        if here and b"MS_ROLE=MS_WORKER" in words and (rank is None or f"RANK_ID={rank}".encode() in words):
            found.append(int(path.name))
    return found


def kill_if_there(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# --- stops, kills and what cannot go on ---


@pytest.mark.slow
def test_killed_twice_and_stopped_once_it_ends_bit_equal(whole, data, tmp_path):
    folder = Folder(tmp_path / "killed", data)
    process = folder.start()
    folder.wait_for_steps(process, 2)
    process.kill()
    process.wait()
    assert [row["step"] for row in folder.rows()][:2] == ["1", "2"]  # the curve of a run that saved nothing yet
    process = folder.start(**folder.resume())
    folder.wait_for_steps(process, 7)
    process.kill()
    process.wait()
    saved = max(folder.complete())
    process = folder.start(**folder.resume())
    folder.wait_for_steps(process, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 143, folder.text()[-3000:]
    assert re.search(rf"resuming from \S+rank_0/glm32k_rank_0-\S+ \(step {saved:g}\)", folder.text())
    stopped = int(folder.rows()[-1]["step"])
    assert read_meta(folder.ranks / "rank_0")["global_step"] == stopped in folder.complete()
    assert len(folder.files()) == 2
    newest = folder.ranks / "rank_0" / read_meta(folder.ranks / "rank_0")["last_ckpt_file"]
    newest.chmod(0o600)
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert folder.run(**folder.resume()) == 0, folder.text()[-3000:]
    assert re.search(rf"left out, not complete: \S+/{newest.name}: .*cut off", folder.text())
    assert len(folder.files()) == 2 and not list(folder.path.rglob(".saving"))
    assert_bit_equal(folder, whole)


def test_what_cannot_be_resumed_is_a_line(whole, data, tmp_path):
    folder = Folder(tmp_path / "other", data)
    shutil.copytree(whole.ranks, folder.ranks)
    for path in folder.ranks.rglob("*.ckpt"):
        os.utime(path, (1, 1) if path.name == read_meta(path.parent)["last_ckpt_file"] else None)
    assert folder.run(load_checkpoint="output/checkpoint/rank_0", resume_training=True) == 2
    assert f"is complete, step {STEPS} of {STEPS}" in folder.error()  # the newest by its step
    fewer = {"train_dataset__data_loader__num_samples": 16, "load_checkpoint": "output/checkpoint"}
    assert folder.run(resume_training=True, **fewer) == 2
    assert f"trained on {RECORDS} records an epoch, train_dataset has 16" in folder.error()
    (folder.path / "empty").mkdir()
    assert folder.run(load_checkpoint="empty", resume_training=True) == 2
    assert "load_checkpoint empty: no checkpoint in it" in folder.error()


def test_a_run_that_is_lost_stops_and_keeps_the_last_checkpoint(data, tmp_path):
    folder = Folder(tmp_path / "lost", data)
    options = {"lr_schedule__learning_rate": 1e30, "runner_wrapper__use_clip_grad": False}
    process = folder.start(**options, lr_schedule__warmup_steps=0)
    assert process.wait(TIMEOUT) == 1
    assert "in 5 steps in a row the loss is not finite" in folder.error() or "first parameter" in folder.error()
    assert len(folder.rows()) < STEPS
    for name in folder.files():
        assert first_bad_tensor(folder.ranks / "rank_0" / name) is None


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_a_line_and_ctrl_c_ends_the_first(data, tmp_path):
    folder = Folder(tmp_path / "shared", data)
    first = folder.start(runner_config__epochs=2000)
    try:
        folder.wait_for_steps(first, 1)
        assert folder.run() == 2
        assert "another run trains there" in folder.error() and "--output_dir" in folder.error()
        first.send_signal(signal.SIGINT)
        assert first.wait(TIMEOUT) == 130
    finally:
        first.kill()
    assert read_meta(folder.ranks / "rank_0")["global_step"] == int(folder.rows()[-1]["step"])


# --- long ---


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_twenty_kills_of_one_process(data, tmp_path, long_whole):
    folder = Folder(tmp_path / "killed", data)
    in_a_save = kill_many(folder, int(os.environ.get("GLM32K_KILLS", 20)), random.Random(1))
    assert in_a_save > 0 and len(folder.files()) == 1
    assert_bit_equal(folder, long_whole)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_twenty_kills_of_two_processes(data, tmp_path):
    folder = Folder(tmp_path / "killed", data)
    in_a_save = kill_many(folder, int(os.environ.get("GLM32K_KILLS", 20)), random.Random(2), processes=2)
    assert in_a_save > 0 and folder.complete(2) == {LONG["lr_schedule__total_steps"]}
    assert [row["step"] for row in folder.rows()] == [str(step + 1) for step in range(LONG["lr_schedule__total_steps"])]


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_a_dead_one_ends_the_job(data, tmp_path):
    folder = Folder(tmp_path / "two", data)
    process = folder.start(2, runner_config__epochs=2000)
    folder.wait_for_steps(process, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 143, folder.text()[-3000:]
    metas = [read_meta(folder.ranks / f"rank_{rank}") for rank in range(2)]
    assert metas[0]["global_step"] == metas[1]["global_step"] == int(folder.rows()[-1]["step"])
    process = folder.start(2, runner_config__epochs=2000, **folder.resume())
    folder.wait_for_steps(process, 2)
    begun = time.monotonic()
    for pid in workers(folder, rank=1):
        kill_if_there(pid)
    assert process.wait(TIMEOUT) not in (0, 2)
    assert time.monotonic() - begun < 60
    assert re.search(r"worker 1 \(process \d+\) ended first, killed by signal 9", folder.text())


@pytest.mark.slow
def test_a_disk_that_fills_at_random_moments(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    rng = random.Random(3)
    folder = Folder(disk / "run", data)
    options = {"callbacks__2__keep_checkpoint_max": 1, "callbacks__2__save_checkpoint_steps": 1}
    try:
        failures = 0
        for _ in range(int(os.environ.get("GLM32K_FILLS", 4))):
            process = folder.start(**options, **folder.resume(), runner_config__epochs=2000)
            folder.wait_for_steps(process, rng.randint(2, 4))
            ballast = disk / "ballast"
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while process.poll() is None:
                        file.write(bytes(rng.randint(1, 1 << 20)))
                except OSError:
                    pass
            status = process.wait(TIMEOUT)
            failures += status == 2 and "bytes are free there" in folder.error()
            assert folder.complete(), folder.text()[-2000:]
            assert not [path for path in folder.path.rglob("*") if "tmp" in path.name or path.name == ".saving"]
            ballast.unlink()
        assert failures > 0
    finally:
        process.kill()
        subprocess.run(["umount", "-l", str(disk)], check=False)

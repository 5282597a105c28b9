"""Starts one process per rank, follows what it says, and gathers what it leaves."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_glm32k.dryrun.compile import frontend
from mindformers_glm32k.dryrun.compile.worker import CONFIG_FILE, NOTE, RECORD_FILE, ROWS_FILE
from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.parallel import ParallelLayout, check_layout

_ERROR = "error: "
_WORKER = (sys.executable, "-m", "mindformers_glm32k.dryrun.compile.worker")
# Seconds that a first estimate is made of, on the two-core machines this was measured on; later ones use what was seen.
_START_SECONDS = 12
_SECONDS_PER_LAYER_CALL = 0.6


@dataclass
class Compiled:
    """What a worker left.

    Args:
        rank (int): whose program it is.
        folder (pathlib.Path): with the program, its text and the strategy file below it.
        record (dict): the worker's record.
    """

    rank: int
    folder: Path
    record: dict


class WorkerFailed(CommandFailed):
    """A worker ended without a program. The message holds the end of its log."""


def read_config(launcher_arguments, folder):
    """The configuration as run_mindformer merges it, read in a process of its own: MindFormers writes logs when
    imported.

    Args:
        launcher_arguments (list[str]): run_mindformer's.
        folder (pathlib.Path): for the log and other files that are not wanted afterwards.

    Returns:
        dict

    Raises:
        InputError: what run_mindformer would refuse.
        WorkerFailed: anything else.
    """
    status = _follow(
        [*_WORKER, "--folder", str(folder), "--describe", "--", *launcher_arguments],
        {**os.environ, "LOCAL_DEFAULT_PATH": str(folder)},
        folder / "log_config.txt",
    )
    if status != 0:
        raise _failure("the configuration could not be read", status, folder / "log_config.txt")
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def read_rows(launcher_arguments, steps, folder):
    """The batches of the first steps, made by the configuration's own data set class, in a process of its own.

    Args:
        launcher_arguments (list[str]): run_mindformer's; the batch they ask for is that of a step.
        steps (int): how many.
        folder (pathlib.Path): for the log and other files that are not wanted afterwards.

    Returns:
        dict[str, numpy.ndarray] | None: by column, (steps, rows, ...); None when data or vocabulary are not there.

    Raises:
        InputError: data that the data set class refuses.
        WorkerFailed: anything else.
    """
    log = folder / "log_rows.txt"
    status = _follow(
        [*_WORKER, "--folder", str(folder), "--rows", str(steps), "--", *launcher_arguments],
        {**os.environ, "LOCAL_DEFAULT_PATH": str(folder)},
        log,
    )
    if status != 0:
        raise _failure("the rows could not be read", status, log)
    path = folder / ROWS_FILE
    return dict(np.load(path)) if path.exists() else None


def read_layout(launcher_arguments, devices=None):
    """The configuration and its layout, checked.

    Args:
        launcher_arguments (list[str]): run_mindformer's.
        devices (int | None): NPUs of the run, where known.

    Returns:
        tuple[Layout, dict]: the layout, the merged configuration.

    Raises:
        InputError: what run_mindformer or `check_layout` would refuse.
        WorkerFailed: anything else.
    """
    with tempfile.TemporaryDirectory(prefix="glm32k_config_") as folder:
        config = read_config(launcher_arguments, Path(folder).resolve())
    check_layout(config, devices)
    return ParallelLayout.from_config(config), config


def run_workers(ranks, layout, folder, launcher_arguments, strategy_only=False, on_done=None, jobs=1, to_execute=False):
    """Compiles the programs of some ranks.

    Args:
        ranks (list[int]): whose.
        layout (Layout): of the configuration.
        folder (pathlib.Path): each rank gets a folder below it; its log goes to `log_rank_R.txt` in it.
        launcher_arguments (list[str]): run_mindformer's.
        strategy_only (bool): no program is kept.
        on_done (callable): gets a Compiled after each rank, one at a time.
        jobs (int): how many are compiled at the same time; large programs keep the machine busy one by one.
        to_execute (bool): initial values are kept, too; the program's text is not written, data files are not read.

    Raises:
        InputError: the configuration is refused by the trainer; its own message.
        WorkerFailed: anything else.
    """
    progress = _Progress(ranks, layout, jobs)
    done = threading.Lock()

    def compile_one(rank):
        place = folder / f"rank_{rank}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        log = folder / f"log_rank_{rank}.txt"
        command = [
            *_WORKER,
            "--rank",
            str(rank),
            "--world",
            str(layout.world),
            "--folder",
            str(place),
            *(["--strategy_only"] if strategy_only else []),
            *(["--to_execute"] if to_execute else []),
            "--",
            *launcher_arguments,
            "--output_dir",
            str(place / "output"),
        ]
        progress.start(rank)
        environment = {
            **os.environ,
            **frontend.environment(rank, layout.world, None if to_execute else place / "text"),
            "LOCAL_DEFAULT_PATH": str(place / "output"),
        }
        status = _follow(command, environment, log, lambda what: progress.note(rank, what))
        if status != 0 or not (place / RECORD_FILE).exists():
            raise _failure(f"the program of rank {rank} was not compiled", status, log)
        progress.finish(rank)
        record = json.loads((place / RECORD_FILE).read_text(encoding="utf-8"))
        if on_done:
            with done:
                on_done(Compiled(rank, place, record))

    try:
        with ThreadPoolExecutor(jobs) as pool:
            running = [pool.submit(compile_one, rank) for rank in ranks]
            try:
                for future in running:
                    future.result()
            finally:
                for future in running:
                    future.cancel()
    finally:
        progress.close()


def _follow(command, environment, log, on_note=None):
    """Runs a worker; its notes go to `on_note`, everything else to the log."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        try:
            for line in process.stdout:
                if line.startswith(NOTE):
                    if on_note:
                        on_note(line[len(NOTE) :].strip())
                else:
                    file.write(line)
            return process.wait()
        finally:
            process.kill()
            process.wait()


def _failure(what, status, log):
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line for line in lines if line.startswith(_ERROR)]
    if status == 2 and told:
        return InputError(told[-1][len(_ERROR) :])
    end = "\n".join(line for line in lines if " - INFO - " not in line and line.strip())[-3000:]
    return WorkerFailed(f"{what} (exit status {status}); the log's end:\n{end}")


class _Progress:
    """One line on standard error: which rank, what it does, how long, how much longer."""

    def __init__(self, ranks, layout, jobs=1):
        self.ranks, self.layout, self.jobs = list(ranks), layout, jobs
        calls = layout.layers / layout.stages * (layout.micro_batches if layout.stages > 1 else 8)
        self.expected = _START_SECONDS + _SECONDS_PER_LAYER_CALL * calls
        self.seen = []
        self.started = {}  # rank -> when, of those that are being compiled
        self.last = None  # (rank, what it does)
        self.closed = threading.Event()
        self.on_terminal = sys.stderr.isatty()
        if self.on_terminal:
            threading.Thread(target=self._tick, daemon=True).start()

    def start(self, rank):
        self.started[rank] = time.monotonic()
        self.note(rank, "start")

    def note(self, rank, what):
        self.last = (rank, what, self.started.get(rank, time.monotonic()))
        self._show()

    def finish(self, rank):
        started = self.started.pop(rank)
        self.seen.append(time.monotonic() - started)
        self.last = (rank, f"compiled in {self.seen[-1]:.0f} s", started)
        self._show()

    def close(self):
        if self.on_terminal and not self.closed.is_set():
            print(file=sys.stderr)
        self.closed.set()

    def _left(self):
        each = sum(self.seen) / len(self.seen) if self.seen else self.expected
        now = time.monotonic()
        begun = sum(max(each - (now - started), 0) for started in list(self.started.values()))
        waiting = len(self.ranks) - len(self.seen) - len(self.started)
        seconds = (begun + each * waiting) / self.jobs
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

    def _show(self):
        rank, what, started = self.last
        stage = f" (stage {self.layout.stage_of(rank)} of {self.layout.stages})" if self.layout.stages > 1 else ""
        text = f"rank {rank}{stage}: {what}, {time.monotonic() - started:.0f} s; about {self._left()} left"
        print(
            f"\r\033[K{text}" if self.on_terminal else text,
            end="" if self.on_terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def _tick(self):
        while not self.closed.wait(1):
            if self.last is not None:
                self._show()

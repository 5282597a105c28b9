"""Starts one process per rank, follows what it says, and gathers what it leaves."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mindformers_glm32k.dryrun import frontend
from mindformers_glm32k.dryrun.layout import layout_of
from mindformers_glm32k.dryrun.layout_checks import check_layout
from mindformers_glm32k.dryrun.worker import CONFIG_FILE, NOTE, RECORD_FILE
from mindformers_glm32k.errors import InputError

_ERROR = "error: "
_WORKER = (sys.executable, "-m", "mindformers_glm32k.dryrun.worker")
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


class WorkerFailed(RuntimeError):
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
    status = _follow([*_WORKER, "--folder", str(folder), "--describe", "--", *launcher_arguments],
                     {**os.environ, "LOCAL_DEFAULT_PATH": str(folder)}, folder / "log_config.txt", None)
    if status != 0:
        raise _failure("the configuration could not be read", status, folder / "log_config.txt")
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


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
    return layout_of(config), config


def run_workers(ranks, layout, folder, launcher_arguments, strategy_only=False, on_done=None):
    """Compiles the programs of some ranks, one after the other (a compile keeps the machine busy).

    Args:
        ranks (list[int]): whose.
        layout (Layout): of the configuration.
        folder (pathlib.Path): each rank gets a folder below it; its log goes to `log_rank_R.txt` in it.
        launcher_arguments (list[str]): run_mindformer's.
        strategy_only (bool): no program is kept.
        on_done (callable): gets a Compiled after each rank.

    Raises:
        InputError: the configuration is refused by the trainer; its own message.
        WorkerFailed: anything else.
    """
    progress = _Progress(ranks, layout)
    for rank in ranks:
        place = folder / f"rank_{rank}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        log = folder / f"log_rank_{rank}.txt"
        command = [*_WORKER, "--rank", str(rank), "--world", str(layout.world), "--folder", str(place),
                   *(["--strategy_only"] if strategy_only else []), "--", *launcher_arguments, "--output_dir",
                   str(place / "output")]
        progress.start(rank)
        environment = {**os.environ, **frontend.environment(rank, layout.world, place / "text"),
                       "LOCAL_DEFAULT_PATH": str(place / "output")}
        status = _follow(command, environment, log, progress)
        if status != 0 or not (place / RECORD_FILE).exists():
            progress.close()
            raise _failure(f"the program of rank {rank} was not compiled", status, log)
        progress.finish(rank)
        record = json.loads((place / RECORD_FILE).read_text(encoding="utf-8"))
        if on_done:
            on_done(Compiled(rank, place, record))
    progress.close()


def _follow(command, environment, log, progress):
    """Runs a worker; its notes go to the progress line, everything else to the log."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", env=environment)
        try:
            for line in process.stdout:
                if line.startswith(NOTE):
                    if progress:
                        progress.note(line[len(NOTE):].strip())
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
        return InputError(told[-1][len(_ERROR):])
    end = "\n".join(line for line in lines if " - INFO - " not in line and line.strip())[-3000:]
    return WorkerFailed(f"{what} (exit status {status}); the log's end:\n{end}")


class _Progress:
    """One line on standard error: which rank, what it does, how long, how much longer."""

    def __init__(self, ranks, layout):
        self.ranks, self.layout = list(ranks), layout
        calls = layout.layers / layout.stages * (layout.micro_batches if layout.stages > 1 else 8)
        self.expected = _START_SECONDS + _SECONDS_PER_LAYER_CALL * calls
        self.seen = []
        self.rank = self.what = None
        self.started = time.monotonic()
        self.closed = threading.Event()
        self.on_terminal = sys.stderr.isatty()
        if self.on_terminal:
            threading.Thread(target=self._tick, daemon=True).start()

    def start(self, rank):
        self.rank, self.started = rank, time.monotonic()
        self.note("start")

    def note(self, what):
        self.what = what
        self._show()

    def finish(self, rank):
        self.seen.append(time.monotonic() - self.started)
        self.note(f"compiled in {self.seen[-1]:.0f} s")

    def close(self):
        if self.on_terminal and not self.closed.is_set():
            print(file=sys.stderr)
        self.closed.set()

    def _left(self):
        each = sum(self.seen) / len(self.seen) if self.seen else self.expected
        is_done = len(self.seen) > self.ranks.index(self.rank)
        current = 0 if is_done else max(each - (time.monotonic() - self.started), 0)
        seconds = current + each * (len(self.ranks) - self.ranks.index(self.rank) - 1)
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

    def _show(self):
        stage = f" (stage {self.layout.stage_of(self.rank)} of {self.layout.stages})" if self.layout.stages > 1 else ""
        text = (f"rank {self.rank}{stage}: {self.what}, {time.monotonic() - self.started:.0f} s; "
                f"about {self._left()} left")
        print(f"\r\033[K{text}" if self.on_terminal else text, end="" if self.on_terminal else "\n", file=sys.stderr,
              flush=True)

    def _tick(self):
        while not self.closed.wait(1):
            if self.rank is not None:
                self._show()

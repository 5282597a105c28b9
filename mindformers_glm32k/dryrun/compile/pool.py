"""Starts one process per rank, shows its progress notes, and gathers its program and strategy file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_glm32k.dryrun.compile import frontend
from mindformers_glm32k.dryrun.compile.worker import BATCHES_FILE, CONFIG_FILE, NOTE, RECORD_FILE
from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.files import copy_atomically
from mindformers_glm32k.parallel import ParallelLayout, check_layout
from mindformers_glm32k.process import free_memory, resident_memory
from mindformers_glm32k.weights.strategy import add_frozen

_ERROR = "error: "
_WORKER = (sys.executable, "-m", "mindformers_glm32k.dryrun.compile.worker")
# For the first estimate of the time left, measured on two cores; later estimates use the ranks compiled so far.
_START_SECONDS = 12
_SECONDS_PER_LAYER_CALL = 0.6
FILE_NAME = "ckpt_strategy_rank_{}.ckpt"  # the run's own name, which transform_ckpt looks for
_LEAST_FREE = 1 << 30  # bytes of the machine's memory that workers leave free
_LOOK_EVERY = 0.2  # seconds
_WITHOUT_ADAPTERS = ["--model.model_config.pet_config", ""]


@dataclass
class Compiled:
    """A worker's results: its rank, the folder with the program, its text and the strategy file, and the worker's
    record."""

    rank: int
    folder: Path
    record: dict


class WorkerFailed(CommandFailed):
    """A worker ended without a program. The message holds the end of its log."""


def read_batches(launcher_arguments: list[str], steps: int, folder: Path) -> dict[str, np.ndarray] | None:
    """The batches of the first steps, made by the configuration's own data set class in a separate process.

    Args:
        launcher_arguments: run_mindformer's options; their batch size is that of a step.
        steps: number of steps.
        folder: for the log and temporary files.

    Returns:
        Arrays (steps, batch, ...) by column; None when data or vocabulary are missing.

    Raises:
        InputError: data that the data set class refuses.
        WorkerFailed: anything else.
    """
    _run_worker("batches", "the batches could not be read", ["--batches", str(steps)], launcher_arguments, folder)
    path = folder / BATCHES_FILE
    return dict(np.load(path)) if path.exists() else None


def read_layout(launcher_arguments: list[str], devices: int | None = None) -> tuple[ParallelLayout, dict]:
    """The parallel layout and the merged configuration of run_mindformer's options, checked; `devices` is the number of
    NPUs of the run, where known.

    Raises:
        InputError: what run_mindformer or `check_layout` would refuse.
        WorkerFailed: anything else.
    """
    config = read_config(launcher_arguments)
    check_layout(config, devices)
    return ParallelLayout.from_config(config), config


def read_config(launcher_arguments: list[str]) -> dict:
    """The merged configuration of run_mindformer's options, its layout not checked. It is read in a process of its own:
    MindFormers writes logs when imported.

    Raises:
        InputError: what run_mindformer would refuse.
        WorkerFailed: anything else.
    """
    with tempfile.TemporaryDirectory(prefix="glm32k_config_") as name:
        folder = Path(name).resolve()
        _run_worker("config", "the configuration could not be read", ["--describe"], launcher_arguments, folder)
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def run_workers(
    ranks: Sequence[int],
    layout: ParallelLayout,
    folder: Path,
    launcher_arguments: list[str],
    strategy_only: bool = False,
    on_done: Callable[[Compiled], None] | None = None,
    jobs: int = 1,
    for_simulation: bool = False,
) -> None:
    """Compiles the programs of some ranks.

    Args:
        ranks: the ranks to compile.
        layout: of the configuration.
        folder: rank R writes to `rank_R/` and its log to `log_rank_R.txt`, both in `folder`.
        launcher_arguments: run_mindformer's options.
        strategy_only: no program is kept.
        on_done: gets a Compiled after each rank, one at a time.
        jobs: ranks compiled at the same time; one large program keeps the machine busy.
        for_simulation: initial values are kept, too; the program's text is not written, data files are not read.

    Raises:
        InputError: the trainer refuses the configuration; its own message.
        WorkerFailed: anything else.
    """
    progress = _Progress(ranks, layout, jobs)
    done = threading.Lock()

    def compile_one(rank):
        own = folder / f"rank_{rank}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        log = folder / f"log_rank_{rank}.txt"
        options = ["--rank", str(rank), "--world_size", str(layout.world), "--folder", str(own)]
        options += ["--strategy_only"] if strategy_only else []
        options += ["--for_simulation"] if for_simulation else []
        progress.start(rank)
        environment = frontend.environment(rank, layout.world, None if for_simulation else own / "text")
        what = f"the program of rank {rank} was not compiled"
        _follow(
            what,
            [*_WORKER, *options, "--", *launcher_arguments, "--output_dir", str(own / "output")],
            {**_inherited(), **environment, "LOCAL_DEFAULT_PATH": str(own / "output")},
            log,
            lambda note: progress.note(rank, note),
        )
        if not (own / RECORD_FILE).exists():
            raise _failure(what, 0, log)
        progress.finish(rank)
        record = json.loads((own / RECORD_FILE).read_text(encoding="utf-8"))
        if on_done:
            with done:
                on_done(Compiled(rank, own, record))

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


def _run_worker(name, what_failed, options, launcher_arguments, folder):
    """Runs a worker that compiles nothing; its log goes to `log_NAME.txt`."""
    log = folder / f"log_{name}.txt"
    command = [*_WORKER, "--folder", str(folder), *options, "--", *launcher_arguments]
    _follow(what_failed, command, {**_inherited(), "LOCAL_DEFAULT_PATH": str(folder)}, log)


def _inherited():
    """This process's environment without RUN_MODE, which MindFormers leaves there after a prediction: a trainer that
    finds it would predict."""
    return {name: value for name, value in os.environ.items() if name != "RUN_MODE"}


def _follow(what_failed, command, environment, log, on_note=None):
    """Runs a worker to its end; its notes go to `on_note`, everything else to the log. Raises where it fails."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        guard = _MemoryGuard(process)
        try:
            for line in process.stdout:
                if line.startswith(NOTE):
                    if on_note:
                        on_note(line[len(NOTE) :].strip())
                else:
                    file.write(line)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            guard.join()
    if guard.ended:
        raise WorkerFailed(f"{what_failed}: {guard.ended}")
    if status != 0:
        raise _failure(what_failed, status, log)


class _MemoryGuard(threading.Thread):
    """Kills a worker before the machine runs out of memory: the kernel's OOM killer might pick another process.

    Attributes:
        ended: why the worker was killed; empty where it was not.
    """

    _one_at_a_time = threading.Lock()  # the memory of one killed worker may be enough for the others

    def __init__(self, process: subprocess.Popen):
        super().__init__(daemon=True)
        self.process, self.ended = process, ""
        self.start()

    def run(self) -> None:
        """Watches free memory until the worker ends."""
        while self.process.poll() is None:
            with self._one_at_a_time:
                free = free_memory()
                if free is None:
                    return
                if free < _LEAST_FREE:
                    held = resident_memory(self.process.pid)
                    if self.process.poll() is None and held:
                        self.ended = (
                            f"it held {held / 2**30:.1f} GiB when less than {_LEAST_FREE / 2**30:.1f} GiB of the "
                            "machine's memory were free; take a machine with more, or fewer layers (dryrun --quick)"
                        )
                    self.process.kill()
                    self.process.wait()
            time.sleep(_LOOK_EVERY)


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
        self.started = {}  # rank -> start time, of ranks being compiled
        self.last = None  # (rank, what it does, start time)
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
        text, end = (f"\r\033[K{text}", "") if self.on_terminal else (text, "\n")
        print(text, end=end, file=sys.stderr, flush=True)

    def _tick(self):
        while not self.closed.wait(1):
            if self.last is not None:
                self._show()


def has_adapters(config: dict) -> bool:
    """Whether the run freezes the model's own weights and trains adapters (LoRA)."""
    return bool(config["model"]["model_config"].get("pet_config"))


def write_strategies(
    layout: ParallelLayout, output: Path, launcher_arguments: list[str], adapters: bool = False
) -> list[Path]:
    """Compiles one rank of each stage and writes the files of all ranks, by rank.

    A strategy file says how each parameter of a stage is sharded, not which shard this rank holds: ranks of a stage
    have equal files, byte for byte. MindSpore leaves frozen weights out, though it shards them too; transform_ckpt
    would then take rank 0's shard for the whole. Their layouts are added from a second compile, without adapters.

    Args:
        layout: of the configuration.
        output: folder of the files.
        launcher_arguments: run_mindformer's options.
        adapters: whether the run trains adapters only.

    Raises:
        InputError: one NPU, or a folder that holds files of a larger layout.
    """
    if layout.world == 1:
        raise InputError(
            f"{launcher_arguments[launcher_arguments.index('--config') + 1]}: one NPU (use_parallel is false, or all "
            "of parallel_config is 1) has no strategy; its checkpoints are whole"
        )
    _refuse_other_layouts(output, layout)
    with tempfile.TemporaryDirectory(prefix="glm32k_strategy_") as work:
        kept = Path(work) / "kept"
        kept.mkdir()

        def keep(compiled: Compiled) -> None:
            path = kept / str(layout.stage_of(compiled.rank))
            content = strategy_file(compiled.folder, compiled.rank).read_bytes()
            path.write_bytes(add_frozen(path.read_bytes(), content) if path.exists() else content)
            shutil.rmtree(compiled.folder)

        for more in [[], _WITHOUT_ADAPTERS] if adapters else [[]]:
            run_workers(
                [layout.ranks_of(stage)[0] for stage in range(layout.stages)],
                layout,
                Path(work).resolve(),
                [*launcher_arguments, *more],
                strategy_only=True,
                on_done=keep,
            )
        written = [output / FILE_NAME.format(rank) for rank in range(layout.world)]
        for rank, path in enumerate(written):  # all or none: nothing is written before the last compile
            copy_atomically(kept / str(layout.stage_of(rank)), path)
    return written


def strategy_file(folder: Path, rank: int) -> Path:
    """The file that a worker of `rank` left below its folder."""
    return folder / "output" / "strategy" / FILE_NAME.format(rank)


def _refuse_other_layouts(output, layout):
    """transform_ckpt merges all files of a folder: those of a larger layout would be mixed in."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file, a folder is needed")
    expected = {FILE_NAME.format(rank) for rank in range(layout.world)}
    others = sorted(path.name for path in output.glob("ckpt_strategy_rank_*.ckpt") if path.name not in expected)
    if others:
        raise InputError(
            f"--output {output}: holds {others[0]} of a layout with more than {layout.world} NPUs; give another folder"
        )

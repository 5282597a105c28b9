"""GLM32KMonitor: throughput in tokens/s/p beside MindFormers' progress lines, and the loss curve as CSV and PNG."""

from __future__ import annotations

import csv
import math
import os
import time
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.utils import get_output_root_path
from mindspore.communication import GlobalComm, get_group_size, get_rank
from mindspore.train.callback import Callback, RunContext

from mindformers_glm32k.checks import whole_number
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.parallel import one_program, pipeline_stages
from mindformers_glm32k.training import wrappers

COLUMNS = ("step", "loss", "learning_rate", "global_norm", "loss_scale", "overflow", "tokens_per_second_per_device")


class GLM32KMonitor(Callback):
    """Logs tokens/s/p (the unit of the model card's table) and keeps the loss curve.

    One process writes `loss_curve.csv` and `loss_curve.png`: rank 0, or in a pipeline the first rank of the last
    stage, which is where the loss is. A resumed run continues the file of the run before it.

    Args:
        output_dir: folder of the curve. Default: MindFormers' output folder.
        per_print_times: log every so many steps, >= 1.
    """

    def __init__(self, output_dir: str | None = None, per_print_times: int = 1):
        super().__init__()
        self.output_dir = output_dir or get_output_root_path()
        self.per_print_times = whole_number(per_print_times, "GLM32KMonitor.per_print_times", 1)
        self.rows = []
        self.started = None
        self.step_before = 0
        self.unrecorded = None  # the run's context, while a step has no row yet

    def on_train_begin(self, run_context: RunContext) -> None:
        arguments = run_context.original_args()
        devices = get_group_size() if GlobalComm.INITED else 1
        rank = get_rank() if GlobalComm.INITED else 0
        stages = pipeline_stages()
        self.writes = rank == (devices - devices // stages if stages > 1 else 0)
        self.micro_batches = wrappers.micro_batches(arguments.train_network)
        self.tokens_per_step = int(np.prod(arguments.train_dataset.output_shapes()[0])) / _sharers(devices)
        self.step_before = arguments.cur_step_num
        self.rows = self._rows_before(self._global_step(arguments))
        self.written = 0  # rows of this run in the file

    def on_train_step_begin(self, run_context: RunContext) -> None:
        self.started, self.unrecorded = time.perf_counter(), run_context

    def on_train_step_end(self, run_context: RunContext) -> None:
        self._record()

    def _record(self):
        """Adds the row of the step that has just ended, once."""
        if self.unrecorded is None:
            return
        arguments, self.unrecorded = self.unrecorded.original_args(), None
        seconds = time.perf_counter() - self.started
        steps = max(1, arguments.cur_step_num - self.step_before)  # a data sink runs several steps per call
        self.step_before = arguments.cur_step_num
        loss, overflow, scale, rate, norm = (_number(value) for value in _five(arguments.net_outputs))
        overflow = overflow > 0  # False for the NaN of a train step without the check
        throughput = self.tokens_per_step * steps / seconds
        step = self.rows[-1]["step"] + steps if self.rows else self._global_step(arguments) or steps
        self.rows.append(dict(zip(COLUMNS, (step, loss / self.micro_batches, rate, norm, scale, overflow, throughput))))
        if overflow:
            logger.warning(
                "step %d skipped: its gradients are not finite (loss %g, loss scale now %g)", step, loss, scale
            )
        if len(self.rows) % self.per_print_times == 0:
            logger.info("step %d: %.1f tokens/s/p", step, throughput)
        if self.writes:
            self._append_row()

    def on_train_end(self, run_context: RunContext) -> None:
        if not self.writes or not self.rows:
            return
        skipped = sum(row["overflow"] for row in self.rows)
        speed = np.median([row["tokens_per_second_per_device"] for row in self.rows[1:] or self.rows])
        first, last = self.rows[0], self.rows[-1]
        logger.info(
            "training: %d steps, %d skipped, loss %.4f -> %.4f, median %.1f tokens/s/p; curve: %s, %s",
            *(last["step"], skipped, first["loss"], last["loss"], speed, self._save_table(), self._save_picture()),
        )

    @staticmethod
    def _global_step(arguments: Any) -> int:
        step = getattr(getattr(arguments.network, "optimizer", None), "global_step", None)
        return int(step.asnumpy().reshape(-1)[0]) if step is not None else 0

    def _rows_before(self, step):
        """The rows of the earlier run up to its `step` updates, among which skipped steps do not count."""
        path = os.path.join(self.output_dir, "loss_curve.csv")
        if step == 0 or not os.path.isfile(path):
            return []
        with open(path, newline="", encoding="utf-8") as file:
            found = [row for row in csv.DictReader(file) if None not in row.values()]  # a killed run leaves half a row
        rows = [{column: _parse(column, text) for column, text in row.items()} for row in found]
        skipped = np.cumsum([row["overflow"] for row in rows])
        return [row for row, before in zip(rows, skipped) if row["step"] - before <= step]

    def save_curve(self) -> None:
        """Writes the table anew and in full, with the step that has just ended. A checkpoint callback calls it
        before it saves: a run killed right after a save resumes behind that step, whose row would be missing."""
        self._record()
        if self.writes and self.rows:
            self._save_table()

    def _append_row(self):
        """Appends the last row after each step, so that a kill loses none; the first call writes the file anew."""
        if not self.written:
            self._save_table()
        else:
            with open(os.path.join(self.output_dir, "loss_curve.csv"), "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerow(self.rows[-1])
        self.written += 1

    def _save_table(self):
        path = os.path.join(self.output_dir, "loss_curve.csv")
        with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        return path

    def _save_picture(self):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        steps = [row["step"] for row in self.rows]
        figure, axis = pyplot.subplots(figsize=(8, 4.5), dpi=100)
        axis.plot(steps, [row["loss"] for row in self.rows], label="loss", linewidth=1.2)
        skipped = [(row["step"], row["loss"]) for row in self.rows if row["overflow"] and math.isfinite(row["loss"])]
        if skipped:
            axis.plot(*zip(*skipped), "rx", label="skipped (overflow)")
        axis.set_xlabel("step")
        axis.set_ylabel("loss (mean over tokens)")
        axis.grid(alpha=0.3)
        axis.legend()
        path = os.path.join(self.output_dir, "loss_curve.png")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, bbox_inches="tight")
        pyplot.close(figure)
        return path


def _sharers(devices):
    """How many devices read the same sequences. In data parallel each reads its own; in the semi-automatic modes all
    read the whole batch, or as the first dimension of dataset_strategy says."""
    if not one_program():
        return 1
    strategy = ms.get_auto_parallel_context("dataset_strategy")
    if ms.get_auto_parallel_context("full_batch") or strategy == "full_batch":
        return devices
    return 1 if isinstance(strategy, str) else devices // strategy[0][0]


def first_outputs(outputs: Any) -> tuple[float, bool]:
    """The loss, and whether the step was skipped, of any train-step cell's outputs."""
    loss, overflow = (_number(value) for value in _five(outputs)[:2])
    return loss, overflow > 0


def _five(outputs):
    """(loss, overflow, loss scale, learning rate, global norm) of any train-step cell; None where it has none."""
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    return (outputs + [None] * 5)[:5]


def _number(value):
    if value is None:
        return math.nan
    return float(np.mean(value.asnumpy())) if isinstance(value, ms.Tensor) else float(value)


def _parse(column, text):
    if column == "overflow":
        return text == "True"
    return int(text) if column == "step" else float(text)

"""Ending a run: signals that ask for it, and consecutive bad steps from which no run recovers."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator

import mindspore as ms
import numpy as np
from mindformers.tools.utils import get_real_rank
from mindspore.communication import GlobalComm, get_group_size

from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.files import Busy, lock_file

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Remembers SIGTERM and SIGINT instead of ending the process, so that a step can finish and be saved; the second
    signal of a kind has its earlier effect."""

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def install(self) -> None:
        """To be called before each step: at the start of an epoch MindSpore's data engine installs its own handler of
        SIGINT, which sends SIGTERM. Does nothing outside the main thread, where Python allows no handlers."""
        if self.received is not None or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            before = signal.signal(number, self._remember)
            self._before.setdefault(number, before)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before = {}

    def _remember(self, number, _frame):
        self.received = number
        signal.signal(number, self._before.pop(number) or signal.SIG_DFL)

    def exit_status(self) -> int | None:
        """The status that a shell reports for a program ended by the signal: 143 or 130; None without a signal."""
        return 128 + self.received if self.received else None


STOP_SIGNALS = StopSignals()  # of this process
_HELD: set[str] = set()  # paths of the locks that this process holds


@contextlib.contextmanager
def hold_output_folder(folder: str | None) -> Iterator[None]:
    """Keeps other runs out of an output folder: they would write the same checkpoints and remove each other's.

    The lock (flock) ends with its process, however that ends. A nested call in the same process does nothing.

    Raises:
        InputError: another run trains there, or the folder cannot be written.
    """
    folder = folder or "./output"
    path = os.path.abspath(os.path.join(folder, f".rank_{get_real_rank() or 0}.lock"))
    if path in _HELD:
        yield
        return
    try:
        os.makedirs(folder, exist_ok=True)
        lock = lock_file(path)
    except Busy as error:
        raise Busy(
            f"output_dir {folder}: another run trains there and holds {path}; wait for its end, or give this one "
            "--output_dir ANOTHER"
        ) from error
    except OSError as error:
        raise InputError(f"output_dir {folder}: cannot be written ({error.strerror}); choose another folder") from error
    _HELD.add(path)
    try:
        yield
    finally:
        _HELD.discard(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        lock.close()


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag, True if it is True in any process of the job. A collective: every process must call it."""
    if not GlobalComm.INITED or get_group_size() == 1:
        return tuple(map(bool, flags))
    total = ms.ops.AllReduce()(ms.Tensor([float(flag) for flag in flags], ms.float32)).asnumpy()
    return tuple(bool(value > 0) for value in total)


class SkippedSteps:
    """Counts consecutive steps that were skipped, and those whose loss itself is not finite.

    A lower loss scale repairs gradients that overflow: 65536 is halved to 1 in 16 steps. It does not repair a loss,
    which is not scaled, and nothing repairs weights that are not finite.

    Args:
        most_skipped: consecutive steps, >= 1, after which `count` raises.
        most_not_finite: the same for steps without a finite loss.
    """

    def __init__(self, most_skipped: int, most_not_finite: int):
        self.most_skipped, self.most_not_finite = most_skipped, most_not_finite
        self.skipped = self.not_finite = 0
        self.all_skipped = True

    def count(self, step: int, loss: float, overflow: bool, parameters: Iterable[ms.Parameter], kept: str) -> None:
        """Counts a step.

        Args:
            step: its number.
            loss: nan where the train step gives none.
            overflow: whether it was skipped.
            parameters: checked when the loss turns NaN or infinite.
            kept: the message's words on the checkpoint that remains.

        Raises:
            CommandFailed: too many bad steps in a row, or a parameter that is not finite.
        """
        bad_loss = not math.isfinite(loss)
        self.not_finite = self.not_finite + 1 if bad_loss else 0
        self.skipped = self.skipped + 1 if overflow or bad_loss else 0
        self.all_skipped = self.all_skipped and self.skipped > 0
        if self.not_finite == 1:
            bad = first_bad_parameter(parameters)
            if bad:
                raise CommandFailed(
                    f"stopped after step {step}: {bad} is the first parameter with NaN or infinity; {kept}"
                )
        for count, most, what in (
            (self.not_finite, self.most_not_finite, "the loss is not finite (the weights are)"),
            (self.skipped, self.most_skipped, "gradients are not finite and the step was skipped"),
        ):
            if count >= most:
                raise CommandFailed(
                    f"stopped after step {step}: in {count} steps in a row {what}; {kept}. Lower the learning rate, "
                    "set max_grad_norm, or look at the data of these steps"
                )

    def at_end(self, kept: str) -> None:
        """Raises CommandFailed where no step of the run has changed the weights."""
        if self.skipped and self.all_skipped:
            raise CommandFailed(f"all {self.skipped} steps were skipped, their gradients are not finite; {kept}")


def first_bad_parameter(parameters: Iterable[ms.Parameter]) -> str | None:
    """The name of the first parameter with NaN or infinity in it, as this process holds it; None without one."""
    for parameter in parameters:
        if parameter.dtype in (ms.float32, ms.float16, ms.bfloat16) and not parameter.has_init:
            values = parameter.astype(ms.float32) if parameter.dtype == ms.bfloat16 else parameter
            if not np.isfinite(values.asnumpy()).all():
                return parameter.name
    return None

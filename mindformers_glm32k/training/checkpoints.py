"""GLM32KCheckpointMonitor: MindFormers' CheckpointMonitor, but safe against kills, full disks and divergence.

Upstream's monitor, in contrast, removes the oldest file and an existing target before it writes the new one; writes
without flushing; counts steps from 1 again after a resume, so that names repeat or run backwards; keeps N files of each
resume; and overwrites finite weights with weights that are not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindformers.core.callback import CheckpointMonitor
from mindformers.tools.logger import logger
from mindspore import nn
from mindspore.train.callback import RunContext
from safetensors import SafetensorError

from mindformers_glm32k.checks import whole_number
from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.files import flush, flush_folder
from mindformers_glm32k.training.monitor import first_outputs
from mindformers_glm32k.training.saved import prefix_for, saved_files, write_meta
from mindformers_glm32k.training.stop import STOP_SIGNALS, SkippedSteps, any_process
from mindformers_glm32k.weights.checkpoint import first_bad_tensor

_SAVING = ".saving"  # subfolder of a rank's folder that no listing of checkpoints includes
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _NothingToRemove:
    """Takes the place of upstream's manager, which removes old files before the new one is written."""

    ckpoint_num = 0

    def update_ckpoint_filelist(self, directory: str, prefix: str) -> None:
        """Files are listed after a save."""


class GLM32KCheckpointMonitor(CheckpointMonitor):
    """Saves checkpoints under the names and in the folders of upstream's CheckpointMonitor.

    A file is written under a temporary name, read back, flushed and renamed; once every process has written its own,
    `meta.json` follows and files beyond `keep_checkpoint_max` are removed. Epoch and step in names and `meta.json` are
    those of the whole training, resumed or not. SIGTERM and SIGINT end the run after a step and a save.

    Args:
        prefix: of the files' names; "_rank_N" is added.
        directory: in place of MindFormers' output folder.
        keep_checkpoint_max: files kept in all, over all resumes; >= 1.
        async_save: accepted with a warning; a step waits for its checkpoint, as half a file is none.
        max_skipped_steps: consecutive steps with non-finite gradients, after which the run stops; >= 1.
        max_bad_losses: the same for a non-finite loss, which no loss scale repairs; >= 1.
        **kwargs: further arguments of CheckpointMonitor.

    Raises:
        InputError: a value out of its range, or an argument of CheckpointMonitor that is not supported here.
    """

    def __init__(
        self,
        prefix: str = "CKP",
        directory: str | None = None,
        keep_checkpoint_max: int = 5,
        async_save: bool | str = False,
        max_skipped_steps: int = 20,
        max_bad_losses: int = 5,
        **kwargs,
    ):
        for name in ("keep_checkpoint_per_n_minutes", "enc_key", "exception_save", "use_checkpoint_health_monitor"):
            if kwargs.get(name):
                raise InputError(f"GLM32KCheckpointMonitor.{name}: for upstream's CheckpointMonitor only; leave it out")
        if kwargs.get("use_legacy_format") is False:
            raise InputError("use_legacy_format: False needs upstream's CheckpointMonitor among the callbacks")
        self.keep = whole_number(keep_checkpoint_max, "GLM32KCheckpointMonitor.keep_checkpoint_max", 1)
        if async_save:
            logger.warning("GLM32KCheckpointMonitor.async_save: checkpoints are written before the next step")
        try:
            super().__init__(prefix=prefix, directory=directory, keep_checkpoint_max=self.keep, **kwargs)
        except (OSError, TypeError) as error:  # MindSpore raises TypeError for a folder that it cannot create
            if isinstance(error, TypeError) and "permission" not in str(error).lower():
                raise
            raise InputError(f"output_dir: no checkpoints can be written there ({error}); choose another") from error
        self._graph_saved = True
        self._manager = self._network_manager = self._trainable_manager = _NothingToRemove()
        # upstream adds _append_step_num to the steps of this run; here steps count the whole training already
        self.steps_before, self._append_step_num = int(self._append_step_num), 0
        self._last_triggered_step = self.steps_before
        self.name = f"{prefix}_rank_{self.rank_id}"
        self.watch = SkippedSteps(
            whole_number(max_skipped_steps, "GLM32KCheckpointMonitor.max_skipped_steps", 1),
            whole_number(max_bad_losses, "GLM32KCheckpointMonitor.max_bad_losses", 1),
        )
        self._meta = None

    def on_train_begin(self, run_context: RunContext) -> None:
        super().on_train_begin(run_context)
        self._prefix = prefix_for(Path(self._directory).parent, self.name, self.steps_before > 0)
        for folder in self._folders():
            shutil.rmtree(folder / _SAVING, ignore_errors=True)  # what a killed run left

    def on_train_step_begin(self, run_context: RunContext) -> None:
        super().on_train_step_begin(run_context)
        STOP_SIGNALS.install()

    def step_end(self, run_context: RunContext) -> None:
        arguments = self._of_whole_training(run_context.original_args())
        step = arguments.cur_step_num
        loss, overflow = first_outputs(arguments.net_outputs)
        self.watch.count(step, loss, overflow, arguments.train_network.get_parameters(), self._kept())
        stop, due = any_process(STOP_SIGNALS.received is not None, self._check_save_ckpt(arguments, False))
        if stop or due:
            self._save_ckpt(arguments, True)
        if stop:
            number = STOP_SIGNALS.received or "a signal to another process"
            logger.warning("signal %s: stopped after step %d; %s", number, step, self._kept())
            run_context.request_stop()

    def end(self, run_context: RunContext) -> None:
        STOP_SIGNALS.restore()
        arguments = self._of_whole_training(run_context.original_args())
        if arguments.cur_step_num > self.steps_before:
            self.watch.at_end(self._kept())
        self._save_ckpt(arguments, True)

    def _of_whole_training(self, arguments: Any) -> Any:
        """A copy of a callback's arguments with the step and the epoch of the whole training."""
        # not by copy.copy, which fails before Python 3.11: MindSpore's dict looks up special methods as keys
        arguments = type(arguments)(arguments)
        arguments.cur_step_num += self.steps_before
        arguments.cur_epoch_num = max(arguments.cur_step_num - 1, 0) // arguments.batch_num + 1
        return arguments

    def _save_ckpt(self, arguments: Any, force_to_save: bool = False) -> None:
        step, before = arguments.cur_step_num, self._last_triggered_step
        if step == before:
            return
        if self.watch.not_finite:
            logger.warning("step %d: not saved, its loss is not finite; %s", step, self._kept())
            return
        error = None
        self._meta = None
        try:
            for callback in getattr(arguments, "list_callback", None) or ():
                if hasattr(callback, "save_curve"):
                    callback.save_curve()
            super()._save_ckpt(arguments, force_to_save)
        except (OSError, RuntimeError, SafetensorError, InputError, CommandFailed) as caught:
            error = caught
        finally:
            for folder in self._folders():
                shutil.rmtree(folder / _SAVING, ignore_errors=True)
        (failed,) = any_process(error is not None)
        if failed:
            self._last_triggered_step = before
        if error is not None:
            raise self._explained(error, step) from error
        if failed:
            raise CommandFailed(f"step {step}: another process could not save its checkpoint; {self._kept()}")
        try:
            if self._meta:
                runs = {"steps_per_epoch": arguments.batch_num, "epochs": getattr(arguments, "epoch_num", None)}
                write_meta(self.meta_json, *self._meta, step, {**runs, "global_batch_size": self.global_batch_size})
        except OSError as caught:
            raise self._explained(caught, step) from caught
        self._remove_old()

    def record_last_ckpt_to_json(self, epoch: int, step: int, ckpt_file: str) -> None:
        """Keeps for later what upstream would write now: other processes may not have their files yet."""
        self._meta = (epoch, step, ckpt_file)

    def remove_redundancy(
        self, network: nn.Cell | list, cur_file: str, append_dict: dict, train_network: nn.Cell | None
    ) -> None:
        """Upstream's one function that writes files, of all three kinds; here under a temporary name first."""
        target = Path(cur_file)
        temporary = target.parent / _SAVING / target.name
        temporary.parent.mkdir(parents=True, exist_ok=True)
        super().remove_redundancy(network, str(temporary), append_dict, train_network)
        os.chmod(temporary, 0o600)
        bad = first_bad_tensor(temporary)  # fails on a file whose list of tensors cannot be read, too
        if bad:
            raise CommandFailed(f"not saved: {bad} is the first parameter with NaN or infinity; {self._kept()}")
        flush(temporary)
        os.chmod(temporary, 0o400)  # as MindSpore leaves it
        os.replace(temporary, target)
        flush_folder(target.parent)

    def _folders(self) -> Iterator[Path]:
        for folder in (self._directory, self.network_directory, self.trainable_directory):
            if os.path.isdir(folder):
                yield Path(folder)

    def _remove_old(self):
        kinds = (
            (self._directory, self._prefix),
            (self.network_directory, f"{self._prefix}-network"),
            (self.trainable_directory, f"{self._prefix}-trainable_params"),
        )
        for folder, prefix in kinds:
            files = saved_files(folder, prefix, self._config.format) if os.path.isdir(folder) else []
            # files beyond this step are of an earlier run resumed from the same checkpoint: they are removed first
            beyond = [path for path, step in files if step > self._last_triggered_step]
            others = [path for path, step in files if step <= self._last_triggered_step]
            for path in [*beyond[::-1], *others][: max(len(files) - self.keep, 0)]:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    def _kept(self) -> str:
        """The checkpoint that remains, for messages."""
        files = (
            saved_files(self._directory, self._prefix, self._config.format) if os.path.isdir(self._directory) else []
        )
        steps = [(step, path) for path, step in files if step <= self._last_triggered_step]
        if not steps:
            return "no checkpoint was saved before"
        step, path = max(steps)
        return f"the last checkpoint is {path} (step {step:g})"

    def _explained(self, error: Exception, step: int) -> Exception:
        if isinstance(error, CommandFailed):
            return error
        folder = self._directory
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder if os.path.isdir(folder) else ".").free
            told = any(f"(os error {number})" in str(error) for number in _NO_SPACE)  # by safetensors
            full = told or getattr(error, "errno", None) in _NO_SPACE or free < 1 << 20
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            todo = "free some space" if full else "make the folder writable"
            return InputError(
                f"{folder}: the checkpoint of step {step} cannot be written ({reason}), {free:,} bytes are free there; "
                f"{todo}, or choose another output_dir. {self._kept()}"
            )
        return InputError(f"{folder}: the checkpoint of step {step} cannot be written ({error}); {self._kept()}")

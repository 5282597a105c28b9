"""Which checkpoint a run resumes from, whether it can, and what has changed since.

MindFormers takes the file with the latest modification time, needs exactly the folder that contains rank_0, and reports
only after minutes, by an error from C++, that a run cannot resume.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from mindformers.tools.utils import get_real_rank
from mindspore import Tensor, nn

from mindformers_glm32k import compat
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import one_program
from mindformers_glm32k.preflight import check_finite
from mindformers_glm32k.training.saved import LABEL, read_meta
from mindformers_glm32k.weights.checkpoint import read_file
from mindformers_glm32k.weights.rank_files import RankFiles, choose, count_of, rank_folders, scalar_of

CALLBACK = "GLM32KCheckpointMonitor"
_SUFFIXES = (".ckpt", ".safetensors")


def choose_checkpoint(config: MindFormerConfig) -> None:
    """Sets a configuration's checkpoint to load: in the output folder of a training run the complete one of the latest
    step, or the one that `resume_training` names.

    `output`, `output/checkpoint` and `output/checkpoint/rank_0` are equivalent. Files, and folders of other kinds, are
    left as they are, except a file to resume from, for which MindFormers needs the folder.

    Raises:
        InputError: an empty folder, no complete checkpoint, or none of that name.
    """
    path, resume = compat.checkpoint_path(config), config.get("resume_training")
    if not isinstance(path, str) or not path or not os.path.exists(path):
        return
    if os.path.isfile(path):
        folder = Path(path).absolute().parent
        if resume and rank_folders(folder.parent) and folder.name.startswith("rank_"):
            path, resume = str(folder.parent), Path(path).name
        else:
            return
    root = _folder_with_ranks(Path(path))
    if root is None:
        return
    chosen, remarks = _named(root, resume) if isinstance(resume, str) else _newest(root)
    for remark in remarks:
        logger.warning("%s: %s", root, remark)
    rank = get_real_rank() or 0
    file = chosen.files.get(rank, chosen.files[min(chosen.files)])
    step = chosen.counters.get("step_num")
    check_finite(file)
    logger.info("%s %s (step %s)", "resuming from" if resume else "loading", file, "?" if step is None else step)
    if config.get("load_ckpt_format") != file.suffix[1:]:
        config.load_ckpt_format = file.suffix[1:]
    if resume:
        compat.set_checkpoint_path(config, str(root))
        config.resume_training = file.name
    elif not one_program(config) or not config.get("use_parallel"):
        if not config.get("auto_trans_ckpt"):
            compat.set_checkpoint_path(config, str(file))
    else:
        _check_newest_by_time(root, chosen)
        compat.set_checkpoint_path(config, str(root))


def _folder_with_ranks(path):
    """The folder with rank_N: `path`, its `checkpoint` or its parent; None for other kinds, such as Hugging Face's."""
    for folder in (path, path / "checkpoint", path.absolute().parent):
        if rank_folders(folder) and (folder != path.absolute().parent or path.absolute().name.startswith("rank_")):
            return folder
    if any(name.endswith((".ckpt", ".safetensors", ".bin", ".json", ".index")) for name in os.listdir(path)):
        return None
    if any(found.suffix in (*_SUFFIXES, ".bin") for found in path.rglob("*")):
        return None  # a hub's cache
    raise InputError(
        f"load_checkpoint {path}: no checkpoint in it; a file, or a folder with rank_0, rank_1, … is needed, such as "
        "output/checkpoint"
    )


def _newest(root):
    """The newest complete checkpoint of the run that saved last, by meta.json; of all runs where that one has none."""
    name = read_meta(rank_folders(root)[0]).get("last_ckpt_file")
    run = re.match(r"(.+)-\d+_\d+\.\w+$", str(name))
    if run:
        head = re.sub(r"_rank_\d+", "_rank_*", run[1])
        try:
            return choose(root, wanted=lambda each: each.name.rpartition("-")[0] == head)
        except InputError as error:
            logger.warning("%s: of the run that saved last: %s", root, " ".join(str(error).split()))
    return choose(root)


def _named(root, name):
    """The checkpoint with a file of this name, with or without suffix, in any rank's folder."""
    if not any(name in (path.name, path.stem) for folder in rank_folders(root) for path in folder.iterdir()):
        there = sorted(path.name for path in rank_folders(root)[0].iterdir() if path.suffix in _SUFFIXES)
        raise InputError(f"resume_training: {root} has no {name}; there are {', '.join(there) or 'none'}")
    return choose(root, wanted=lambda each: any(name in (path.name, path.stem) for path in each.files.values()))


def _check_newest_by_time(root: Path, chosen: RankFiles) -> None:
    """Refuses a newer file of another checkpoint: of one program's shards MindFormers loads the newest files."""
    for path in chosen.files.values():
        others = [other for other in path.parent.iterdir() if other.suffix == path.suffix]
        newest = max(others, key=os.path.getmtime)
        if newest != path and newest.stat().st_mtime > path.stat().st_mtime:
            raise InputError(
                f"load_checkpoint {root}: {chosen.name} is of the latest step, and {newest.name} was written after it, "
                "which MindFormers would load; move the other files away, or touch these"
            )


def resumed_file(config: Mapping[str, Any]) -> Path | None:
    """This process's file of the checkpoint that a run is resumed from, once it is chosen; None without one."""
    path, name = compat.checkpoint_path(config), config.get("resume_training")
    if not path or not name:
        return None
    if os.path.isfile(path):
        return Path(path)
    rank = 0 if config.get("auto_trans_ckpt") else get_real_rank() or 0
    file = Path(path) / f"rank_{rank}" / str(name)
    return file if file.is_file() else None


def check_continuation(config: MindFormerConfig, steps_per_epoch: int, global_batch_size: int) -> None:
    """Compares a resumed run with the one that saved the checkpoint, and logs what has changed.

    Args:
        config: the run's, with the checkpoint chosen.
        steps_per_epoch: of its data.
        global_batch_size: sequences of one step.

    Raises:
        InputError: a file without a step, fewer records than before, or a run that is complete.
    """
    file = resumed_file(config)
    if file is None:
        return
    tensors = {tensor.name: tensor for tensor in read_file(file)}
    step, epoch = (count_of(tensors.get(name)) for name in ("step_num", "epoch_num"))
    if step is None:
        raise InputError(f"resume_training: {file} does not say its step: it is no checkpoint of training; {_FRESH}")
    before = _run_before(file, step, epoch)
    batch = count_of(tensors.get("global_batch_size")) or global_batch_size
    records, had = steps_per_epoch * global_batch_size, (before.get("steps_per_epoch") or 0) * batch
    if records + global_batch_size <= had:  # a remainder of less than a batch is left out
        least = "" if before.get("exact") else "at least "
        raise InputError(
            f"resume_training: {file} was trained on {least}{had} records an epoch, train_dataset has {records}; the "
            "run cannot go on where it was. Give the same records, or load the checkpoint with resume_training: False"
        )
    now = int(step * batch / global_batch_size)
    epochs, total = config.runner_config.epochs, config.runner_config.epochs * steps_per_epoch
    if now >= total:
        raise InputError(
            f"resume_training: {file} is complete, step {now} of {total} ({epochs} epochs of {steps_per_epoch} steps); "
            "raise --epochs to go on"
        )
    if batch != global_batch_size:
        logger.warning(
            "resumed with %d sequences a step instead of %d: step %d counts as step %d",
            global_batch_size,
            batch,
            step,
            now,
        )
    if before.get("exact") and had and records >= had + global_batch_size:
        logger.warning("resumed with %d records an epoch instead of %d: epochs are longer", records, had)
    if before.get("epochs") and before["epochs"] != epochs:
        stretched = (config.get("lr_schedule") or {}).get("total_steps") in (None, -1)
        logger.warning(
            "resumed with %d epochs instead of %d%s",
            epochs,
            before["epochs"],
            f": the learning rate follows a schedule of {total} steps from here, as lr_schedule.total_steps is -1"
            if stretched
            else "",
        )


_FRESH = "set resume_training: False to start from its weights"


def _run_before(file, step, epoch):
    """Steps per epoch and epochs of the run that wrote a file: from meta.json, else from the file's name."""
    meta = read_meta(file.parent)
    if isinstance(meta.get("steps_per_epoch"), int) and str(meta.get("last_ckpt_file"))[:-1]:
        return {**meta, "exact": True}
    label = LABEL.search(file.name)
    if not label or not epoch:
        return {}
    in_epoch = int(label[2])
    if epoch > 1 and (step - in_epoch) % (epoch - 1) == 0:
        return {"steps_per_epoch": (step - in_epoch) // (epoch - 1), "exact": True}
    return {"steps_per_epoch": in_epoch}


def complete_callbacks(config: MindFormerConfig, global_batch_size: int) -> None:
    """Gives this plugin's checkpoint callback the arguments that MindFormers gives its own; restores the loss scale."""
    callbacks = [one for one in config.get("callbacks") or () if isinstance(one, dict) and one.get("type") == CALLBACK]
    file = resumed_file(config)
    for callback in callbacks:
        callback["global_batch_size"] = global_batch_size
    if file is None or not callbacks:
        return
    runner, scale = config.runner_config, config.runner_wrapper.scale_sense
    value = scalar_of({tensor.name: tensor for tensor in read_file(file)}.get("loss_scale"))
    if value is not None and scale is not None:
        if hasattr(scale, "loss_scale_value"):
            scale.loss_scale_value = value
        else:
            config.runner_wrapper.scale_sense = value
    info = {"step_num": runner.initial_step, "epoch_num": runner.initial_epoch, "loss_scale": value or 1.0}
    for callback in callbacks:
        callback["append_info"] = [info]


def restore_scale_window(config: MindFormerConfig, step: nn.Cell) -> None:
    """Restores the window counters of a dynamic loss scale from the checkpoint. MindFormers starts them anew, so that
    the scale of a resumed run would grow later than without the interruption."""
    file, manager = resumed_file(config), getattr(step, "loss_scaling_manager", None)
    if file is None or manager is None:
        return
    stored = {tensor.name: tensor for tensor in read_file(file)}
    for parameter in manager.get_parameters():
        count = count_of(stored.get(parameter.name))
        if count is not None:
            parameter.set_data(Tensor(count, parameter.dtype))

"""Which checkpoint a run resumes from, what is refused, what is logged; whole runs are in test_surviving_runs.py."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from mindspore import Parameter, Tensor, nn

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.training.resume import (
    check_continuation,
    choose_checkpoint,
    complete_callbacks,
    restore_scale_window,
)

RECORDS, BATCH = 40, 8
STEPS = RECORDS // BATCH


def save(step, rank=0, root="output/checkpoint", value=0.0, **meta):
    """A checkpoint of a run of 5 steps an epoch, and meta.json that names it."""
    epoch, in_epoch = (step - 1) // STEPS + 1, (step - 1) % STEPS + 1
    folder = Path(root) / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"glm32k_rank_{rank}-{epoch}_{in_epoch}.ckpt"
    counters = {"epoch_num": epoch, "step_num": step, "loss_scale": 4096.0, "global_batch_size": BATCH}
    weights = [{"name": "transformer.a.weight", "data": Tensor(np.full((4, 4), value, np.float32))}]
    window = [("current_iterator_step", step + 1), ("last_overflow_iterator_step", 3)]
    weights += [{"name": name, "data": Tensor(count, ms.int32)} for name, count in window]
    ms.save_checkpoint(weights, str(path), append_dict=counters)
    keys = {"last_epoch": epoch, "last_step": in_epoch, "last_ckpt_file": path.name, "global_step": step}
    keys.update({"steps_per_epoch": STEPS, "epochs": 4, "global_batch_size": BATCH, **meta})
    (folder / "meta.json").write_text(json.dumps(keys))
    return path


def run(path="output", resume=True, **changes):
    values = {
        "load_checkpoint": str(path),
        "resume_training": resume,
        "use_parallel": False,
        "auto_trans_ckpt": False,
        "runner_config": {"epochs": 4, "initial_step": 0, "initial_epoch": 0},
        "lr_schedule": {"total_steps": -1},
        "runner_wrapper": {"scale_sense": {"loss_scale_value": 65536}},
        "callbacks": [{"type": "GLM32KCheckpointMonitor"}],
    }
    return MindFormerConfig(**{**values, **changes})


def cut_off(path):
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.fixture
def said(monkeypatch):
    """What is logged: (level, text)."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            logger, level, lambda text, *values, level=level: lines.append((level, text % values if values else text))
        )
    return lines


def texts(said, level):
    return [text for one, text in said if one == level]


# --- which checkpoint ---


@pytest.mark.parametrize("path", ["output", "output/checkpoint", "output/checkpoint/rank_0"])
@pytest.mark.parametrize("resume", [True, False])
def test_the_newest_by_its_step_after_a_copy_that_changed_the_times(path, resume, said):
    older, newest = save(7), save(9)
    os.utime(newest, (1, 1))
    os.utime(older)
    config = run(path, resume)
    choose_checkpoint(config)
    assert texts(said, "info") == [f"{'resuming from' if resume else 'loading'} {newest.absolute()} (step 9)"] or (
        f"{newest} (step 9)" in texts(said, "info")[0]
    )
    if resume:
        assert (Path(config.load_checkpoint).name, config.resume_training) == ("checkpoint", newest.name)
    else:
        assert Path(config.load_checkpoint).samefile(newest)


def test_of_a_newest_one_that_is_cut_off_the_one_before_is_taken(said):
    older, newest = save(7), save(9)
    cut_off(newest)
    config = run()
    choose_checkpoint(config)
    assert config.resume_training == older.name
    (warning,) = texts(said, "warning")
    assert newest.name in warning and "left out, not complete" in warning


def test_a_step_that_one_rank_lacks_is_left_out(said):
    for rank in (0, 1):
        save(7, rank)
    save(9, 0)
    config = run()
    choose_checkpoint(config)
    assert config.resume_training == "glm32k_rank_0-2_2.ckpt"
    assert any("rank 1 is missing" in text for text in texts(said, "warning"))


def test_one_by_name(said):
    older = save(7)
    save(9)
    for name in (older.name, older.stem):
        config = run(resume=name)
        choose_checkpoint(config)
        assert config.resume_training == older.name
    with pytest.raises(InputError, match=r"has no x\.ckpt; there are glm32k_rank_0-2_2\.ckpt, glm32k_rank_0-2_4\.ckpt"):
        choose_checkpoint(run(resume="x.ckpt"))


def test_nothing_to_load(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="load_checkpoint empty: no checkpoint in it"):
        choose_checkpoint(run("empty"))
    cut_off(save(7))
    with pytest.raises(InputError, match="glm32k_rank_0-2_2"):
        choose_checkpoint(run())


@pytest.mark.parametrize("resume", [True, False])
def test_nan_is_refused(resume, said):
    path = save(7, value=np.nan)
    with pytest.raises(InputError, match=rf"{path.name}: transformer\.a\.weight is the first parameter with NaN"):
        choose_checkpoint(run(resume=resume))


# --- whether it can go on, and what has changed ---


def continued(steps_per_epoch=STEPS, batch=BATCH, **changes):
    config = run(**changes)
    choose_checkpoint(config)
    check_continuation(config, steps_per_epoch, batch)


def test_the_same_run_goes_on_without_a_word(said):
    save(7)
    continued()
    assert not texts(said, "warning")


def test_a_changed_batch_size_is_told(said):
    save(8)
    continued(RECORDS // 4, 4)
    assert texts(said, "warning") == ["resumed with 4 sequences a step instead of 8: step 8 counts as step 16"]
    said.clear()
    continued(RECORDS // 20, 20)
    assert texts(said, "warning")[0] == "resumed with 20 sequences a step instead of 8: step 8 counts as step 3"


@pytest.mark.parametrize("total, told", [(-1, True), (None, True), (100, False)])
def test_changed_epochs_and_what_they_do_to_the_learning_rate(total, told, said):
    save(7)
    continued(runner_config={"epochs": 10}, lr_schedule={"total_steps": total})
    (warning,) = texts(said, "warning")
    assert warning.startswith("resumed with 10 epochs instead of 4")
    assert ("the learning rate follows a schedule of 50 steps from here" in warning) == told


def test_other_numbers_of_records(said):
    save(7)
    continued(STEPS + 2)
    assert texts(said, "warning") == ["resumed with 56 records an epoch instead of 40: epochs are longer"]
    with pytest.raises(InputError, match="was trained on 40 records an epoch, train_dataset has 24"):
        continued(3)


def test_a_run_that_is_complete():
    save(20)
    with pytest.raises(InputError, match="is complete, step 20 of 20 .*raise --epochs"):
        continued()


def test_a_file_that_training_did_not_write(tmp_path):
    folder = tmp_path / "output" / "checkpoint" / "rank_0"
    folder.mkdir(parents=True)
    weights = [{"name": "transformer.a.weight", "data": Tensor(np.zeros((4, 4), np.float32))}]
    ms.save_checkpoint(weights, str(folder / "glm32k_rank_0-1_1.ckpt"))
    with pytest.raises(InputError, match="does not say its step"):
        continued()


# --- what goes on ---


class Scale(nn.Cell):
    """The counters of MindSpore's DynamicLossScaleUpdateCell."""

    def __init__(self):
        super().__init__()
        self.cur_iter = Parameter(Tensor(1, ms.int32), name="current_iterator_step")
        self.last_overflow_iter = Parameter(Tensor(0, ms.int32), name="last_overflow_iterator_step")


def test_the_loss_scale_and_its_window():
    save(7)
    config = run()
    choose_checkpoint(config)
    complete_callbacks(config, BATCH)
    assert config.runner_wrapper.scale_sense.loss_scale_value == 4096
    step = SimpleNamespace(loss_scaling_manager=Scale())
    restore_scale_window(config, step)
    manager = step.loss_scaling_manager
    assert (int(manager.cur_iter.asnumpy()), int(manager.last_overflow_iter.asnumpy())) == (8, 3)
    restore_scale_window(run(resume=False), step)  # another run starts anew
    step.loss_scaling_manager = None  # a fixed scale
    restore_scale_window(config, step)

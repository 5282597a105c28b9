"""GLM32KMonitor, driven as MindSpore's Model drives a callback; in real runs it is tested in test_training_runs.py."""

import csv
import math
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from mindformers_glm32k.training import monitor
from mindformers_glm32k.training.monitor import COLUMNS, GLM32KMonitor

BATCH, LENGTH = 4, 32
SECONDS = 0.5  # of every step


class Optimizer(nn.Cell):
    """With the counter of updates that MindSpore's optimizers have."""

    def __init__(self, updates=0):
        super().__init__()
        self.global_step = Parameter(Tensor([updates], ms.int32), name="global_step")


class Wrapper(nn.Cell):
    def __init__(self, network, **attributes):
        super().__init__()
        self.network = network
        for name, value in attributes.items():
            setattr(self, name, value)


class Run:
    """A training run as a callback sees it.

    Args:
        callback (GLM32KMonitor): the callback.
        updates (int): updates that the optimizer has made before, as after loading a checkpoint.
        network (Cell): the train-step cell.
    """

    def __init__(self, callback, updates=0, network=None):
        self.callback = callback
        network = network or Wrapper(nn.Dense(2, 2))
        network.optimizer = Optimizer(updates)
        self.arguments = SimpleNamespace(
            train_network=network,
            network=network,
            cur_step_num=0,
            net_outputs=None,
            train_dataset=SimpleNamespace(output_shapes=lambda: [[BATCH, LENGTH], [BATCH, LENGTH]]),
        )
        self.context = SimpleNamespace(original_args=lambda: self.arguments)
        callback.on_train_begin(self.context)

    def step(self, loss, overflow=False, steps=1):
        """One step, or a sink of several of which the last one's outputs are seen."""
        self.callback.on_train_step_begin(self.context)
        self.arguments.cur_step_num += steps
        counter = self.arguments.network.optimizer.global_step
        counter.set_data(Tensor(counter.asnumpy() + steps - int(overflow)))
        self.arguments.net_outputs = (
            Tensor(loss, ms.float32),
            Tensor(overflow),
            Tensor(1024.0),
            Tensor(0.001),
            Tensor([2.5]),
        )
        self.callback.on_train_step_end(self.context)

    def end(self):
        self.callback.on_train_end(self.context)


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch):
    """Every second reading is half a second after the one before."""
    readings = iter(np.arange(0, 1000, SECONDS))
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(readings))


@pytest.fixture
def messages(monkeypatch):
    """What is logged, by level."""
    found = SimpleNamespace(info=[], warning=[])
    for level in ("info", "warning"):
        monkeypatch.setattr(
            monitor.logger, level, lambda text, *rest, level=level: getattr(found, level).append(text % rest)
        )
    return found


@pytest.fixture
def devices(monkeypatch):
    """A function that makes this process one of several."""

    def set_up(count, rank=0, **parallel):
        context = {
            "parallel_mode": "data_parallel",
            "pipeline_stages": 1,
            "full_batch": False,
            "dataset_strategy": "data_parallel",
            **parallel,
        }
        monkeypatch.setattr(monitor.GlobalComm, "INITED", True)
        monkeypatch.setattr(monitor, "get_group_size", lambda: count)
        monkeypatch.setattr(monitor, "get_rank", lambda: rank)
        monkeypatch.setattr(monitor.ms, "get_auto_parallel_context", context.get)

    return set_up


def table(folder="."):
    with open(f"{folder}/loss_curve.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def steps_of(rows):
    return [int(row["step"]) for row in rows]


def test_curve_as_table_and_picture(tmp_path, messages):
    from matplotlib import image

    run = Run(GLM32KMonitor(str(tmp_path / "curves")))
    for loss in (6.0, 4.0, 3.5):
        run.step(loss)
    run.end()
    rows = table("curves")
    assert tuple(rows[0]) == COLUMNS
    assert [
        [float(row[name]) for name in ("step", "loss", "learning_rate", "global_norm", "loss_scale")] for row in rows
    ] == [[number, loss, pytest.approx(0.001), 2.5, 1024.0] for number, loss in ((1, 6.0), (2, 4.0), (3, 3.5))]
    assert {row["overflow"] for row in rows} == {"False"}
    pixels = image.imread("curves/loss_curve.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20  # more than an empty sheet
    assert messages.info[-1].startswith("training: 3 steps, 0 skipped, loss 6.0000 -> 3.5000, median 256.0 tokens/s/p")
    assert sorted(path.name for path in (tmp_path / "curves").iterdir()) == ["loss_curve.csv", "loss_curve.png"]


def test_the_picture_shows_the_losses(tmp_path):
    """Another curve makes another picture; the same one the same."""
    pictures = []
    for number, losses in enumerate(((6.0, 4.0), (6.0, 4.0), (4.0, 6.0))):
        run = Run(GLM32KMonitor(str(tmp_path / str(number))))
        for loss in losses:
            run.step(loss)
        run.end()
        pictures.append((tmp_path / str(number) / "loss_curve.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_default_folder_is_mindformers_output(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "output"))
    run = Run(GLM32KMonitor())
    run.step(6.0)
    run.end()
    assert len(table("output")) == 1


def test_throughput_of_one_device(messages):
    run = Run(GLM32KMonitor("."))
    run.step(6.0)
    assert messages.info == [f"step 1: {BATCH * LENGTH / SECONDS:.1f} tokens/s/p"]
    run.step(5.0, steps=10)  # a sink of ten steps in the same half second
    assert messages.info[1] == f"step 11: {10 * BATCH * LENGTH / SECONDS:.1f} tokens/s/p"


@pytest.mark.parametrize(
    "parallel, share",
    [
        ({"parallel_mode": "data_parallel"}, 1),  # each device reads its own sequences
        ({"parallel_mode": "semi_auto_parallel", "full_batch": True}, 8),  # all read all sequences
        ({"parallel_mode": "auto_parallel", "full_batch": True, "pipeline_stages": 4}, 8),
        ({"parallel_mode": "semi_auto_parallel", "dataset_strategy": "full_batch"}, 8),
        (
            {"parallel_mode": "semi_auto_parallel", "dataset_strategy": ((2, 1), (2, 1))},
            4,
        ),  # 2 shares, 4 devices read each
        ({"parallel_mode": "semi_auto_parallel", "dataset_strategy": "data_parallel"}, 1),
    ],
)
def test_throughput_per_device(parallel, share, devices):
    devices(8, **parallel)
    run = Run(GLM32KMonitor("."))
    run.step(6.0)
    assert run.callback.rows[0]["tokens_per_second_per_device"] == BATCH * LENGTH / SECONDS / share


def test_only_every_so_many_steps_are_logged(messages):
    run = Run(GLM32KMonitor(".", per_print_times=3))
    for _ in range(7):
        run.step(6.0)
    assert [message.split(":")[0] for message in messages.info] == ["step 3", "step 6"]
    assert len(run.callback.rows) == 7


def test_skipped_steps_are_counted_and_marked(messages):
    run = Run(GLM32KMonitor("."))
    run.step(6.0)
    run.step(math.inf, overflow=True)
    run.step(5.5, overflow=True)
    run.step(5.0)
    run.end()
    assert [row["overflow"] for row in table()] == ["False", "True", "True", "False"]
    assert len(messages.warning) == 2
    assert messages.warning[0] == ("step 2 skipped: its gradients are not finite (loss inf, loss scale now 1024)")
    assert "training: 4 steps, 2 skipped, loss 6.0000 -> 5.0000" in messages.info[-1]


def test_losses_of_micro_batches_are_averaged(devices):
    """A pipeline and gradient accumulation hand out the sum over micro batches."""
    run = Run(GLM32KMonitor("."), network=Wrapper(Wrapper(nn.Dense(2, 2), micro_size=4)))
    run.step(20.0)
    assert run.callback.rows[0]["loss"] == 5.0
    interleaved = Wrapper(Wrapper(Wrapper(nn.Dense(2, 2), interleave_num=2), micro_size=4), micro_size=4)
    run = Run(GLM32KMonitor("."), network=interleaved)
    run.step(40.0)
    assert run.callback.rows[0]["loss"] == 5.0
    per_token = Wrapper(Wrapper(nn.Dense(2, 2), micro_size=4), calculate_per_token_loss=True)
    run = Run(GLM32KMonitor("."), network=per_token)
    run.step(5.0)
    assert run.callback.rows[0]["loss"] == 5.0


@pytest.mark.parametrize(
    "rank, stages, writes", [(0, 1, True), (3, 1, False), (0, 4, False), (6, 4, True), (7, 4, False)]
)
def test_one_process_writes(rank, stages, writes, devices, tmp_path):
    """Rank 0, or the first rank of the last stage, which has the loss."""
    devices(8, rank, pipeline_stages=stages, parallel_mode="semi_auto_parallel", full_batch=True)
    run = Run(GLM32KMonitor("curves"))
    run.step(6.0)
    run.end()
    assert (tmp_path / "curves").exists() == writes


def test_every_step_is_in_the_table_whatever_becomes_of_the_run():
    run = Run(GLM32KMonitor("."))
    for step, loss in enumerate((6.0, 5.0, 4.0), 1):
        run.step(loss)
        assert steps_of(table()) == list(range(1, step + 1))


def test_half_a_row_of_a_killed_run_is_left_out():
    first_run([6.0, 5.0, 4.0])
    with open("loss_curve.csv", encoding="utf-8") as file:
        text = file.read()
    with open("loss_curve.csv", "w", encoding="utf-8", newline="") as file:
        file.write(text[:-30])
    run = Run(GLM32KMonitor("."), updates=2)
    run.step(3.0)
    assert [float(row["loss"]) for row in table()] == [6.0, 5.0, 3.0]


def first_run(losses, skip=()):
    run = Run(GLM32KMonitor("."))
    for number, loss in enumerate(losses, 1):
        run.step(loss, overflow=number in skip)
    run.end()


def test_a_resumed_run_continues_the_file(messages):
    first_run([6.0, 5.0, 4.0, 3.0])
    run = Run(GLM32KMonitor("."), updates=2)  # from a checkpoint of step 2: steps 3 and 4 come again
    run.step(4.5)
    run.step(3.5)
    run.step(2.5)
    run.end()
    rows = table()
    assert steps_of(rows) == [1, 2, 3, 4, 5]
    assert [float(row["loss"]) for row in rows] == [6.0, 5.0, 4.5, 3.5, 2.5]
    assert "training: 5 steps, 0 skipped, loss 6.0000 -> 2.5000" in messages.info[-1]


def test_skipped_steps_do_not_shift_a_resumed_run(messages):
    """The optimizer counts updates, the file counts steps."""
    first_run([6.0, 9.0, 9.0, 5.0, 4.0, 3.0], skip=(2, 3))
    run = Run(GLM32KMonitor("."), updates=3)  # updates 1, 2, 3 are steps 1, 4, 5
    run.step(2.0)
    run.end()
    rows = table()
    assert steps_of(rows) == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in rows] == [6.0, 9.0, 9.0, 5.0, 4.0, 2.0]
    assert "training: 6 steps, 2 skipped" in messages.info[-1]


def test_a_resumed_run_without_the_file_starts_at_its_own_step():
    run = Run(GLM32KMonitor("."), updates=10)
    run.step(4.5)
    run.step(4.0)
    run.end()
    assert steps_of(table()) == [11, 12]


def test_a_new_run_starts_a_new_file():
    first_run([6.0, 5.0, 4.0])
    first_run([7.0])
    assert [row["loss"] for row in table()] == ["7.0"]


def test_a_run_without_steps_leaves_the_file_alone():
    first_run([6.0, 5.0])
    Run(GLM32KMonitor(".")).end()
    assert len(table()) == 2


def test_a_checkpoint_that_is_saved_first_finds_the_row_of_its_step():
    run = Run(GLM32KMonitor("."))
    written = []

    end = run.callback.on_train_step_end

    def saved_first(context):
        run.callback.save_curve()
        written.append([row["loss"] for row in table()])
        end(context)

    run.callback.on_train_step_end = saved_first
    run.step(6.0)
    run.step(5.0)
    assert written == [["6.0"], ["6.0", "5.0"]]
    assert [row["step"] for row in table()] == ["1", "2"]


def test_outputs_of_other_train_steps():
    """A plain cell returns the loss alone, some return no norm."""
    run = Run(GLM32KMonitor("."))
    run.callback.on_train_step_begin(run.context)
    run.arguments.cur_step_num = 1
    run.arguments.net_outputs = Tensor(3.0)
    run.callback.on_train_step_end(run.context)
    row = run.callback.rows[0]
    assert row["loss"] == 3.0 and not row["overflow"] and math.isnan(row["global_norm"])

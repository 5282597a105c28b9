"""GLM32KCheckpointMonitor on a model of one layer, in this process, with everything that happens to a disk; in whole
runs it is tested in test_surviving_runs.py."""

import _thread
import json
import os
import resource
import signal
import stat
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindformers.core.callback import CheckpointMonitor
from mindspore import nn
from mindspore.train import Callback, Model

from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.files import Busy
from mindformers_glm32k.training import checkpoints, stop
from mindformers_glm32k.training.checkpoints import GLM32KCheckpointMonitor
from mindformers_glm32k.training.monitor import GLM32KMonitor
from mindformers_glm32k.training.saved import prefix_for, saved_files
from mindformers_glm32k.training.stop import SkippedSteps, hold_output_folder
from mindformers_glm32k.weights.checkpoint import first_bad_tensor
from mindformers_glm32k.weights.rank_files import choose

STEPS_PER_EPOCH = 5
RANK = Path("output/checkpoint/rank_0")


class At(Callback):
    """Does something after a step of the run; listed first, as MindFormers' own callbacks are."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action = step, action

    def on_train_step_end(self, run_context):
        arguments = run_context.original_args()
        if arguments.cur_step_num == self.step:
            self.action(arguments)


class WithWeight(nn.Cell):
    """A loss of some layers whose names have dots, as those of models."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Dense(width, width)

    def construct(self, x):
        return self.layer(x).mean()


def train(steps, before=0, width=2, callbacks=(), behind=(), rate=0.1, **options):
    """Trains for some steps and returns the callback; `before` as after loading a checkpoint of that step."""
    network = WithWeight(width)
    optimizer = nn.Momentum(network.trainable_params(), rate, 0.9)
    optimizer.global_step = ms.Parameter(ms.Tensor([before], ms.int32), name="global_step")
    info = [{"step_num": before, "epoch_num": 0, "loss_scale": 1.0}] if before else None
    values = {"save_checkpoint_steps": 2, "keep_checkpoint_max": 2, "integrated_save": False, **options}
    monitor = GLM32KCheckpointMonitor(
        prefix="tiny", directory="output", append_info=info, global_batch_size=1, **values
    )
    data = ms.dataset.NumpySlicesDataset({"x": np.ones((STEPS_PER_EPOCH, width), np.float32)}, shuffle=False)
    epochs = -(-steps // STEPS_PER_EPOCH)
    end = At(steps, lambda arguments: None)
    end.on_train_step_end = lambda context: context.original_args().cur_step_num >= steps and context.request_stop()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    cell = nn.TrainOneStepCell(network, optimizer)
    Model(cell).train(epochs, data.batch(1), callbacks=[*callbacks, monitor, *behind, end], dataset_sink_mode=False)
    return monitor


@pytest.fixture(autouse=True)
def no_signal_is_left():
    yield
    stop.STOP_SIGNALS.restore()
    stop.STOP_SIGNALS.received = None


def names(folder=RANK):
    return sorted(path.name for path in folder.iterdir() if path.name != "meta.json")


def meta():
    return json.loads((RANK / "meta.json").read_text())


def test_names_and_meta_follow_the_steps_of_the_whole_training():
    train(7)
    assert names() == ["tiny_rank_0-2_1.ckpt", "tiny_rank_0-2_2.ckpt"]  # steps 6 and 7
    assert meta()["last_ckpt_file"] == "tiny_rank_0-2_2.ckpt" and (meta()["last_epoch"], meta()["last_step"]) == (2, 2)
    assert meta()["global_step"] == 7 and meta()["steps_per_epoch"] == STEPS_PER_EPOCH
    train(4, before=7)  # from the middle of an epoch: steps 8 to 11
    assert names() == ["tiny_rank_0-2_4.ckpt", "tiny_rank_0-3_1.ckpt"]  # steps 9 and 11
    assert meta()["global_step"] == 11 and (meta()["last_epoch"], meta()["last_step"]) == (3, 1)
    assert int(ms.load_checkpoint(str(RANK / "tiny_rank_0-3_1.ckpt"))["step_num"].asnumpy()) == 11


def test_no_checkpoint_is_ahead_of_the_curve(monkeypatch):
    steps, save = [], GLM32KCheckpointMonitor.remove_redundancy

    def saved(self, *arguments):
        with open("loss_curve.csv", encoding="utf-8") as file:
            steps.append(int(file.readlines()[-1].split(",")[0]))
        save(self, *arguments)

    monkeypatch.setattr(GLM32KCheckpointMonitor, "remove_redundancy", saved)
    train(4, behind=[GLM32KMonitor(".")], save_checkpoint_steps=1)
    assert steps == [1, 2, 3, 4]


def test_three_resumes_keep_two_in_all():
    for before in (0, 3, 6, 9):
        train(3, before=before)
    assert names() == ["tiny_rank_0-3_1.ckpt", "tiny_rank_0-3_2.ckpt"]  # 11 and 12


def test_a_run_from_an_older_checkpoint_replaces_what_came_after_it():
    train(10, keep_checkpoint_max=3)
    assert names() == ["tiny_rank_0-2_1.ckpt", "tiny_rank_0-2_3.ckpt", "tiny_rank_0-2_5.ckpt"]  # 6, 8, 10
    train(1, before=6, keep_checkpoint_max=3)
    assert names() == ["tiny_rank_0-2_1.ckpt", "tiny_rank_0-2_2.ckpt", "tiny_rank_0-2_3.ckpt"]  # 6, 7, 8


def test_a_new_run_in_an_old_folder_leaves_its_checkpoints():
    train(3)
    old = names()
    train(4)
    assert names() == sorted([*old, "tiny_rank_0_1-1_2.ckpt", "tiny_rank_0_1-1_4.ckpt"])
    train(2, before=4)
    assert [name for name in names() if name not in old] == ["tiny_rank_0_1-1_4.ckpt", "tiny_rank_0_1-2_1.ckpt"]
    assert prefix_for(RANK.parent, "tiny_rank_1", False) == "tiny_rank_1_2"  # the same number on every rank


def test_files_are_as_upstream_leaves_them():
    train(2)
    (path,) = RANK.glob("*.ckpt")
    ours, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
    upstream = CheckpointMonitor(prefix="tiny", directory="theirs", integrated_save=False, global_batch_size=1)
    assert isinstance(train(2), CheckpointMonitor) and mode == 0o400 and ours
    assert Path(upstream._directory).name == "rank_0"
    chosen, _ = choose("output/checkpoint")
    assert chosen.counters["step_num"] == 2


def test_the_old_file_goes_when_the_new_one_is_complete(monkeypatch):
    seen = []
    original = checkpoints.os.replace

    def replace(source, target):
        if Path(target).suffix == ".ckpt":
            seen.append((names(), first_bad_tensor(source)))
        original(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", replace)
    train(4, keep_checkpoint_max=1)
    assert [files for files, _ in seen] == [[".saving"], [".saving", "tiny_rank_0-1_2.ckpt"]]
    assert names() == ["tiny_rank_0-1_4.ckpt"]


@pytest.mark.parametrize("keep, kind", [(1, "ckpt"), (2, "ckpt"), (2, "safetensors")])
def test_a_disk_that_fills_leaves_the_last_checkpoint(keep, kind):
    """The file system's limit of a file's size stands for a full disk; a real one is in test_surviving_runs.py."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(InputError) as caught:
            train(6, width=256, keep_checkpoint_max=keep, checkpoint_format=kind, callbacks=[At(3, fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text, saved = str(caught.value), f"tiny_rank_0-1_2.{kind}"
    assert "\n" not in text and str(RANK) in text and "bytes are free" in text and saved in text
    assert names() == [saved] and first_bad_tensor(RANK / names()[0]) is None
    assert meta()["last_ckpt_file"] == saved
    assert not [path for path in Path("output").rglob("*") if "tmp" in path.name or ".saving" in path.name]


def test_weights_that_are_not_finite_are_not_saved():
    def spoil(arguments):
        weight = arguments.train_network.network.layer.weight
        weight.set_data(ms.Tensor(np.full(weight.shape, np.nan, np.float32)))

    with pytest.raises(CommandFailed, match=r"layer\.weight is the first parameter.*tiny_rank_0-1_2\.ckpt \(step 2\)"):
        train(6, callbacks=[At(4, spoil)])  # the loss of step 4 was finite: found in what would be saved
    assert names() == ["tiny_rank_0-1_2.ckpt"]


def test_a_loss_that_is_not_finite_names_the_parameter_at_once():
    def spoil(arguments):
        bias = arguments.train_network.network.layer.bias
        bias.set_data(ms.Tensor(np.array([1, np.inf], np.float32)))

    with pytest.raises(CommandFailed, match=r"after step 4: layer\.bias is the first parameter"):
        train(8, callbacks=[At(3, spoil)], save_checkpoint_steps=10)


def test_skipped_steps_in_a_row():
    weight = ms.Parameter(ms.Tensor([1.0], ms.float32), name="w")
    watch = SkippedSteps(3, 2)
    for step in range(9):
        watch.count(step, 1.0, step % 3 != 2, [weight], "")  # two skipped, one not
    with pytest.raises(CommandFailed, match="after step 11: in 3 steps in a row gradients are not finite.*kept"):
        for step in (9, 10, 11):
            watch.count(step, 1.0, True, [weight], "kept")
    watch = SkippedSteps(20, 2)
    with pytest.raises(CommandFailed, match="in 2 steps in a row the loss is not finite"):
        for step in (1, 2):
            watch.count(step, float("nan"), True, [weight], "")
    watch = SkippedSteps(20, 5)
    watch.count(1, 1.0, True, [weight], "")
    with pytest.raises(CommandFailed, match="all 1 steps were skipped"):
        watch.at_end("")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_a_step_and_a_save(number, status):
    """SIGINT as the launcher's thread passes it on: MindSpore makes SIGTERM of what the process gets itself."""
    before = signal.getsignal(number)

    def send(_):
        if number == signal.SIGINT:
            _thread.interrupt_main()
        else:
            signal.raise_signal(number)

    train(9, save_checkpoint_steps=100, callbacks=[At(3, send)])
    assert names() == ["tiny_rank_0-1_3.ckpt"] and meta()["global_step"] == 3
    assert stop.STOP_SIGNALS.exit_status() == status
    assert signal.getsignal(number) == before


def test_what_a_killed_run_left_half_written_goes():
    leftover = RANK / ".saving" / "tiny_rank_0-9_9.ckpt"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    train(2)
    assert names() == ["tiny_rank_0-1_2.ckpt"]


def test_a_file_that_is_cut_off_counts_as_the_oldest():
    train(4)
    files = saved_files(RANK, "tiny_rank_0", "ckpt")
    newest = files[-1][0]
    newest.chmod(0o600)
    newest.write_bytes(newest.read_bytes()[:100])
    assert [(path.name, step) for path, step in saved_files(RANK, "tiny_rank_0", "ckpt")] == [
        (newest.name, -1),
        (files[0][0].name, 2),
    ]


def test_two_runs_in_one_folder(tmp_path):
    with hold_output_folder("output"):
        with hold_output_folder("output"):  # the same process: launcher and trainer
            pass
        child = os.fork()
        if child == 0:
            stop._HELD.clear()
            try:
                with hold_output_folder("output"):
                    os._exit(0)
            except Busy as error:
                os._exit(7 if "another run trains there" in str(error) and "--output_dir" in str(error) else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not list(Path("output").iterdir())
    (tmp_path / "output" / ".rank_0.lock").write_text("of a dead process")
    with hold_output_folder("output"):
        pass


@pytest.mark.parametrize(
    "options, words",
    [
        ({"keep_checkpoint_max": 0}, "keep_checkpoint_max"),
        ({"max_skipped_steps": 0}, "max_skipped_steps"),
        ({"max_bad_losses": "5"}, "max_bad_losses"),
        ({"exception_save": True}, "exception_save: for upstream's CheckpointMonitor only"),
        ({"use_legacy_format": False}, "use_legacy_format"),
    ],
)
def test_values_that_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        GLM32KCheckpointMonitor(prefix="tiny", directory="output", **options)

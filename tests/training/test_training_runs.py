"""Whole runs of the tiny YAMLs through the launcher, each in a process and a folder of its own.

The task: a text that ends in `left` is answered with one word, one that ends in `right` with four, so sequences have
unequal numbers of labels. `Runs` starts what depends on the first training two at a time; the tests look at it.
"""

import ast
import concurrent.futures
import csv
import json
import math
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml
from conftest import ROOT, launchers_environment

from mindformers_glm32k.compat import pynative_is_upstreams
from mindformers_glm32k.run_mindformer import main

YAMLS = ROOT / "research" / "glm32k"
FINETUNE, LORA, PREDICT = (
    f"{kind}_tiny_cpu.yaml" for kind in ("finetune_glm32k", "finetune_glm32k_lora", "predict_glm32k")
)
ANSWERS = {"left": "yes", "right": "no it is 42"}
ROWS, BATCH, EPOCHS = 64, 8, 8
STEPS = ROWS // BATCH * EPOCHS
SAVED = 28  # a step in the middle of an epoch
SMALL_WINDOW = {"runner_wrapper.scale_sense.scale_window": 20}  # good steps, after which the loss scale doubles
PACKED = {"train_dataset.packing": True, "eval_dataset.packing": True}
TIMEOUT = 900  # seconds; a run takes about 15 on a quiet machine


@dataclass
class Finished:
    """A process that has ended, and its folder."""

    folder: Path
    status: int
    log: str

    def curve(self):
        """Rows of loss_curve.csv: dicts of floats, `overflow` as bool."""
        with open(self.folder / "output" / "loss_curve.csv", newline="", encoding="utf-8") as file:
            return [
                {name: text == "True" if name == "overflow" else float(text) for name, text in row.items()}
                for row in csv.DictReader(file)
            ]

    def losses(self):
        return [row["loss"] for row in self.curve()]

    def checkpoints(self):
        """The folder with rank_0 in it."""
        return self.folder / "output" / "checkpoint"

    def checkpoint(self, name=None):
        """A checkpoint of rank 0; the newest by default."""
        folder = self.checkpoints() / "rank_0"
        return folder / (name or json.loads((folder / "meta.json").read_text())["last_ckpt_file"])

    def answers(self):
        """The answers that a prediction wrote."""
        text = (self.folder / "text_generation_result.txt").read_text(encoding="utf-8")
        return [answer for result in ast.literal_eval(text) for answer in result["text_generation_text"]]


class Runs:
    """Starts runs in sub-folders of one folder."""

    def __init__(self, folder, vocab_file):
        self.folder, self.vocab_file = folder, vocab_file
        write_rows(folder / "train.jsonl", ROWS, seed=0)
        write_rows(folder / "eval.jsonl", 16, seed=1)
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        self.environment = launchers_environment()

    def options(self, config, changes):
        """The launcher's options for a run on the data, shrunk to sequences of 48 tokens; changes by dotted key.

        A model that is trained could take longer ones, so that its layers are tiled."""
        values = {
            "model.model_config.seq_length": 48 if config == PREDICT else 1024,
            "model.model_config.padded_vocab_size": 512,
            "lr_schedule.learning_rate": 1e-2,
            "lr_schedule.warmup_steps": 4,
            "lr_schedule.total_steps": STEPS,
            "runner_config.epochs": EPOCHS,
            "runner_config.batch_size": BATCH,
            "callbacks.2.keep_checkpoint_max": 3,
            "callbacks.2.save_checkpoint_steps": SAVED,
            "processor.tokenizer.vocab_file": self.vocab_file,
        }
        for kind in ("train", "eval"):
            values.update(
                {
                    f"{kind}_dataset.data_loader.dataset_dir": self.folder / f"{kind}.jsonl",
                    f"{kind}_dataset.tokenizer.vocab_file": self.vocab_file,
                    f"{kind}_dataset.max_source_length": 32,
                }
            )
        values.update(changes)
        return ["--config", str(YAMLS / config), *(f"--{key}={value}" for key, value in values.items())]

    def run(self, name, config, changes, *more, prepare=None):
        """Runs the launcher to its end, with the changes and further words. `prepare` gets the folder before."""
        return self._finish(
            name,
            [sys.executable, "-m", "mindformers_glm32k.run_mindformer", *self.options(config, changes), *more],
            prepare,
        )

    def run_two_processes(self, name, config, changes):
        """Runs the launcher in two processes through scripts/msrun_launcher.sh."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        order = " ".join(["run_mindformer.py", *(f"'{word}'" for word in self.options(config, changes))])
        return self._finish(
            name,
            ["bash", str(ROOT / "scripts" / "msrun_launcher.sh"), order, "2", str(port), "msrun_log", "True", "300"],
        )

    def _finish(self, name, command, prepare=None):
        folder = self.folder / name
        folder.mkdir()
        if prepare:
            prepare(folder)
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
            check=False,
        )
        log = done.stdout.decode("utf-8", errors="replace")
        (folder / "log.txt").write_text(log, encoding="utf-8")
        return Finished(folder, done.returncode, log)


def write_rows(path, count, seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 5))) for _ in range(50)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            side = rng.choice(list(ANSWERS))
            text = " ".join([*rng.choices(words, k=rng.randint(1, 3)), side])
            file.write(json.dumps({"content": text, "summary": ANSWERS[side]}) + "\n")


def succeeded(run):
    assert run.status == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def runs(small_vocab_file, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), small_vocab_file)


@pytest.fixture(scope="module")
def trained(runs):
    """The fine-tuned tiny model that the other runs start from."""
    return succeeded(runs.run("trained", FINETUNE, SMALL_WINDOW))


@pytest.fixture(scope="module")
def follow_ups(runs, trained):
    """Function of a name: the run of that name, awaited. All are started at once, two at a time."""
    middle, last = trained.checkpoint(f"glm32k_rank_0-4_{SAVED - 24}.ckpt"), trained.checkpoint()
    from_middle = {"load_checkpoint": middle, "runner_config.epochs": 1}
    prompts = ["ab left", "cd ef right", "b c d left"]

    def with_earlier_output(folder):
        shutil.copytree(trained.checkpoints(), folder / "output" / "checkpoint")
        shutil.copy(trained.folder / "output" / "loss_curve.csv", folder / "output")

    def lora_then_predict():
        run = runs.run(
            "lora", LORA, {"load_checkpoint": last, "runner_config.epochs": 1, "runner_wrapper.scale_sense": 1024.0}
        )
        if run.status:
            return run, None
        with open(YAMLS / LORA, encoding="utf-8") as file:
            adapters = yaml.safe_load(file)["model"]["model_config"]["pet_config"]
        changes = {"load_checkpoint": run.checkpoint(), "model.model_config.pet_config": json.dumps(adapters)}
        return run, runs.run("lora_predict", PREDICT, changes, "--predict_data", *prompts[:2])

    started = {
        "resume": lambda: runs.run(
            "resume",
            FINETUNE,
            {"load_checkpoint": "output/checkpoint", **SMALL_WINDOW},
            "--resume_training",
            middle.name,
            prepare=with_earlier_output,
        ),
        "evaluate": lambda: runs.run("evaluate", FINETUNE, {"run_mode": "eval", "load_checkpoint": last}),
        "predict": lambda: runs.run(
            "predict", PREDICT, {"load_checkpoint": last}, "--predict_batch_size", "2", "--predict_data", *prompts
        ),
        "sample": lambda: runs.run(
            "sample",
            PREDICT,
            {"load_checkpoint": last, "model.model_config.top_k": 3},
            "--do_sample",
            "True",
            "--predict_batch_size",
            "8",
            "--predict_data",
            *prompts[:2],
        ),
        "lora": lora_then_predict,
        "pynative": lambda: runs.run("pynative", FINETUNE, {"runner_config.epochs": 1}, "--mode", "1"),
        "overflow": lambda: runs.run(
            "overflow",
            FINETUNE,
            {
                "runner_config.epochs": 2,
                "eval_step_interval": 8,
                "runner_wrapper.scale_sense.loss_scale_value": 2.0**126,
            },
            "--do_eval",
            "True",
        ),
        "one process": lambda: runs.run(
            "one_process", FINETUNE, {**from_middle, "tensorboard": '{"tensorboard_dir": "board"}'}
        ),
        "packed": lambda: runs.run(
            "packed", FINETUNE, {**PACKED, "runner_config.epochs": 4, "eval_step_interval": 12}, "--do_eval", "True"
        ),
        "two processes": lambda: runs.run_two_processes(
            "two_processes", FINETUNE, {**from_middle, "use_parallel": True, "runner_config.batch_size": BATCH // 2}
        ),
    }
    futures = {name: runs.pool.submit(start) for name, start in started.items()}
    return lambda name: futures[name].result()


# --- training ---


def test_the_loss_falls(trained):
    losses = trained.losses()
    assert len(losses) == STEPS
    assert abs(losses[0] - math.log(512)) < 0.3  # a random model knows nothing
    assert np.mean(losses[-8:]) < 0.1 * losses[0]
    assert not any(row["overflow"] for row in trained.curve())


def test_the_log_has_both_throughputs(trained):
    assert len(re.findall(r"samples/s/p", trained.log)) == STEPS
    assert re.findall(r"step (\d+): \d+\.\d tokens/s/p", trained.log) == [str(step + 1) for step in range(STEPS)]
    assert f"training: {STEPS} steps, 0 skipped" in trained.log
    assert (trained.folder / "output" / "loss_curve.png").stat().st_size > 5000


def test_the_learning_rate_follows_the_schedule(trained):
    rates = [row["learning_rate"] for row in trained.curve()]
    assert rates[3] == max(rates) or rates[4] == max(rates)  # four steps of warm-up
    assert max(rates) == pytest.approx(1e-2, rel=0.05) and rates[0] < 5e-3 and rates[-1] < 1e-3


def test_a_dynamic_loss_scale_grows(trained):
    scales = [row["loss_scale"] for row in trained.curve()]
    assert scales[0] == 65536
    assert sorted(set(scales)) == [65536, 131072, 262144, 524288]  # doubled after each 20 good steps
    assert scales == sorted(scales)


def test_what_a_run_leaves_behind(trained):
    names = sorted(path.name for path in (trained.checkpoints() / "rank_0").glob("*.ckpt"))
    assert names == [f"glm32k_rank_0-4_{SAVED - 24}.ckpt", "glm32k_rank_0-7_8.ckpt", "glm32k_rank_0-8_8.ckpt"]
    assert {path.name for path in trained.folder.iterdir()} <= {"output", "log.txt", "modules", "rank_0", "kernel_meta"}


def test_resumed_training_is_bit_equal(trained, follow_ups):
    resumed = succeeded(follow_ups("resume"))
    kept = ("step", "loss", "learning_rate", "global_norm", "overflow", "loss_scale")
    before, after = ([[row[name] for name in kept] for row in run.curve()] for run in (trained, resumed))
    assert len(re.findall(r"step \d+: \d+\.\d tokens/s/p", resumed.log)) == STEPS - SAVED
    assert after == before
    first, second = (ms.load_checkpoint(str(run.checkpoint())) for run in (trained, resumed))
    assert first["global_step"].asnumpy() == second["global_step"].asnumpy() == STEPS
    for name in ("scale_sense", "current_iterator_step", "last_overflow_iterator_step"):
        assert first[name].asnumpy() == second[name].asnumpy(), name
    weights = [name for name in first if name.startswith(("transformer.", "adam_"))]
    assert len(weights) > 40
    for name in weights:
        assert np.array_equal(first[name].asnumpy(), second[name].asnumpy()), name


def test_pynative_mode_trains_alike(trained, follow_ups):
    if pynative_is_upstreams():
        refused = follow_ups("pynative")
        assert refused.status == 2 and not (refused.folder / "output" / "checkpoint").exists()
        [line] = [line for line in refused.log.splitlines() if line.startswith("error: ")]
        assert "context.mode: 1 (PyNative) chooses MindFormers 2.x's own PyNative models" in line
        return
    pynative = succeeded(follow_ups("pynative"))
    assert pynative.losses() == pytest.approx(trained.losses()[: ROWS // BATCH], rel=1e-4)


def test_steps_that_overflow_are_skipped(follow_ups):
    run = succeeded(follow_ups("overflow"))
    rows = run.curve()
    skipped = [row["overflow"] for row in rows]
    assert len(rows) == 16 and skipped[0] and 0 < sum(skipped) < 12
    for number, row in enumerate(rows, 1):
        assert row["loss_scale"] == 2.0 ** (126 - sum(skipped[:number]))  # halved by each skipped step
        assert row["overflow"] != math.isfinite(row["global_norm"])
    assert "step 1 skipped: its gradients are not finite" in run.log
    assert f"training: {len(rows)} steps, {sum(skipped)} skipped" in run.log
    saved = ms.load_checkpoint(str(run.checkpoint()))
    assert saved["global_step"].asnumpy() == len(rows) - sum(skipped)


def test_evaluation_during_training(follow_ups):
    values = perplexities(succeeded(follow_ups("overflow")))
    assert len(values) == 2 and values[1][1] < values[0][1]


def test_tensorboard_gets_the_losses(follow_ups):
    """MindFormers' own writer, which the callbacks of the YAML leave in its place."""
    run = succeeded(follow_ups("one process"))
    (events,) = (run.folder / "board" / "rank_0").glob("events.out.tfevents.*")
    losses = [
        value
        for (value,) in struct.iter_unpack(
            "<f", b"".join(re.findall(rb"\x04loss\x15(.{4})", events.read_bytes(), re.S))
        )
    ]
    assert losses == pytest.approx(run.losses(), rel=1e-6) and len(losses) == ROWS // BATCH


def perplexities(run):
    """(loss, perplexity) of every evaluation in a log."""
    return [
        (float(loss), float(value)) for loss, value in re.findall(r"'loss': ([\d.e+-]+), 'PPL': ([\d.e+-]+)", run.log)
    ]


def test_evaluation_of_a_checkpoint(follow_ups):
    ((loss, perplexity),) = perplexities(succeeded(follow_ups("evaluate")))
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert 1 < perplexity < 1.5  # what was trained holds for unseen samples


# --- checkpoints that do not fit ---


def altered(trained, name, change):
    """A copy of the trained checkpoint with changed entries, in the current folder."""
    entries = ms.load_checkpoint(str(trained.checkpoint()))
    change(entries)
    ms.save_checkpoint([{"name": key, "data": value} for key, value in entries.items()], name)
    return name


OUTPUT_LAYER = "transformer.output_layer.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda entries: entries.pop(OUTPUT_LAYER), f"1 missing: {OUTPUT_LAYER}"),
        (
            lambda entries: entries.update(extra=ms.Parameter(ms.Tensor(np.ones((2, 3), np.float32)))),
            "1 not in the model: extra",
        ),
        (
            lambda entries: entries.update({OUTPUT_LAYER: ms.Parameter(ms.Tensor(np.ones((400, 128), np.float32)))}),
            f"1 of another shape: {OUTPUT_LAYER} is (400, 128) in the file, (512, 128) in the model",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
@pytest.mark.parametrize(
    "config, words_of_run",
    [(FINETUNE, ()), (FINETUNE, ("--run_mode", "eval")), (PREDICT, ("--predict_data", "ab left"))],
    ids=["finetune", "evaluate", "predict"],
)
def test_checkpoints_that_do_not_fit_are_refused(
    config, words_of_run, change, words, runs, trained, monkeypatch, capsys
):
    """Before the first step; MindFormers would go on with random numbers for what it does not find."""
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", "output")
    monkeypatch.setenv("REGISTER_PATH", str(YAMLS))
    name = altered(trained, "altered.ckpt", change)
    assert main(runs.options(config, {"load_checkpoint": name}) + list(words_of_run)) == 2
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {name} does not fit the model: {words}") and "Traceback" not in captured.err
    assert not list(Path("output").glob("checkpoint/**/*.ckpt"))
    assert not Path("text_generation_result.txt").exists()


@pytest.mark.parametrize(
    "config, words_of_run",
    [(FINETUNE, ()), (FINETUNE, ("--run_mode", "eval")), (PREDICT, ("--predict_data", "ab left"))],
    ids=["finetune", "evaluate", "predict"],
)
def test_a_checkpoint_with_nan_is_refused(config, words_of_run, runs, trained, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", "output")
    monkeypatch.setenv("REGISTER_PATH", str(YAMLS))

    def spoil(entries):
        values = entries[OUTPUT_LAYER].asnumpy().copy()
        values[7, 5] = np.nan
        entries[OUTPUT_LAYER] = ms.Parameter(ms.Tensor(values))

    name = altered(trained, "altered.ckpt", spoil)
    assert main(runs.options(config, {"load_checkpoint": name}) + list(words_of_run)) == 2
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert f"{name}: {OUTPUT_LAYER} is the first parameter with NaN" in error and "Traceback" not in captured.err
    assert "RUN_MODE" not in os.environ  # MindFormers leaves it there, and the next trainer would predict


# --- two processes ---


def label_counts():
    """Labels of each record of the training data in the order of the first epoch."""
    with open("train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line)["summary"] for line in file]
    return [len(rows[index]) for index in np.random.default_rng((0, 0)).permutation(ROWS)]


def test_two_processes_train_like_one(runs, follow_ups, monkeypatch):
    one, two = succeeded(follow_ups("one process")), succeeded(follow_ups("two processes"))
    assert len(one.losses()) == len(two.losses()) == ROWS // BATCH
    assert np.abs(np.subtract(one.losses(), two.losses())).max() < 1e-4
    norms = [[row["global_norm"] for row in run.curve()] for run in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    monkeypatch.chdir(runs.folder)
    batches = np.reshape(label_counts(), (-1, BATCH))
    assert (batches[:, ::2].sum(1) != batches[:, 1::2].sum(1)).any()  # a mean of the ranks' means would differ


def test_two_processes_loaded_the_checkpoint(trained, follow_ups):
    """MindFormers waits at a barrier there, which has no kernel on CPU."""
    losses = succeeded(follow_ups("two processes")).losses()
    assert losses[0] < 0.5 * trained.losses()[0]
    assert abs(losses[0] - trained.losses()[SAVED]) < 1


# --- packing ---


def test_packed_rows_train_and_are_evaluated(follow_ups):
    run = succeeded(follow_ups("packed"))
    (rows,) = map(int, re.findall(rf"packing: {ROWS} samples in (\d+) sequences of 48 tokens", run.log))
    losses = run.losses()
    assert rows % BATCH == 0 and rows < ROWS and len(losses) == 4 * rows // BATCH
    assert np.isfinite(losses).all() and abs(losses[0] - math.log(512)) < 0.3
    assert np.mean(losses[-4:]) < 0.4 * losses[0]
    padding = [
        float(share) for share in re.findall(rf"padding: ([\d.]+) % of the positions of {rows} sequences", run.log)
    ]
    assert len(padding) >= 4 and max(padding) < 45  # so few documents do not fill their sequences
    first, last = perplexities(run)
    assert last[1] < first[1]


@pytest.mark.slow
def test_two_processes_train_packed_rows_like_one(runs, trained):
    """Each sample counts alike on whichever device it lies: the losses would differ with weights by device."""
    options = {
        **PACKED,
        "runner_config.epochs": 2,
        "load_checkpoint": trained.checkpoint(f"glm32k_rank_0-4_{SAVED - 24}.ckpt"),
    }
    one = succeeded(runs.run("packed_one_process", FINETUNE, options))
    two = succeeded(
        runs.run_two_processes(
            "packed_two_processes", FINETUNE, {**options, "use_parallel": True, "runner_config.batch_size": BATCH // 2}
        )
    )
    assert len(one.losses()) == len(two.losses()) > 8
    # at this learning rate rounding grows tenfold every few steps: 1e-8 in the first, 1e-4 after ten
    assert np.abs(np.subtract(one.losses(), two.losses()))[:8].max() < 1e-4


@pytest.mark.slow
def test_packed_training_resumes_bit_equal(runs):
    options = {
        **PACKED,
        "train_dataset.rows_per_epoch": 24,
        "runner_config.epochs": 4,
        "callbacks.2.save_checkpoint_steps": 5,
    }
    whole = succeeded(runs.run("packed_whole", FINETUNE, options))
    middle = next(path for path in (whole.checkpoints() / "rank_0").glob("*-2_2.ckpt"))

    def with_earlier_output(folder):
        shutil.copytree(whole.checkpoints(), folder / "output" / "checkpoint")
        shutil.copy(whole.folder / "output" / "loss_curve.csv", folder / "output")

    resumed = succeeded(
        runs.run(
            "packed_resumed",
            FINETUNE,
            {**options, "load_checkpoint": "output/checkpoint"},
            "--resume_training",
            middle.name,
            prepare=with_earlier_output,
        )
    )
    assert len(re.findall(r"step \d+: \d+\.\d tokens/s/p", resumed.log)) == len(whole.losses()) - 5
    assert resumed.losses() == whole.losses()


# --- gradient accumulation, evaluation on two processes ---


@pytest.mark.slow
def test_accumulation_resumes_bit_equal_and_with_another_split(runs):
    """Four times two sequences a step, resumed in the middle of an epoch: the same; resumed as one batch: equal."""
    options = {
        "runner_config.epochs": 2,
        "runner_config.batch_size": BATCH // 4,
        "runner_config.gradient_accumulation_steps": 4,
        "callbacks.2.save_checkpoint_steps": 5,
    }
    whole = succeeded(runs.run("accumulated_whole", FINETUNE, options))
    middle = next(path for path in (whole.checkpoints() / "rank_0").glob("*-2_2.ckpt"))
    assert len(whole.losses()) == 2 * ROWS // BATCH

    def with_earlier_output(folder):
        shutil.copytree(whole.checkpoints(), folder / "output" / "checkpoint")
        shutil.copy(whole.folder / "output" / "loss_curve.csv", folder / "output")

    def resumed(name, changes):
        values = {**options, **changes, "load_checkpoint": "output/checkpoint"}
        words = ("--resume_training", middle.name)
        run = succeeded(runs.run(name, FINETUNE, values, *words, prepare=with_earlier_output))
        assert len(re.findall(r"step \d+: \d+\.\d tokens/s/p", run.log)) == len(whole.losses()) - 10
        assert "sequences a step instead of" not in run.log
        return run

    run = resumed("accumulated_resumed", {})
    assert run.losses() == whole.losses()
    first, second = (ms.load_checkpoint(str(one.checkpoint())) for one in (whole, run))
    for name in (name for name in first if name.startswith(("transformer.", "adam_"))):
        assert np.array_equal(first[name].asnumpy(), second[name].asnumpy()), name
    changes = {"runner_config.batch_size": BATCH, "runner_config.gradient_accumulation_steps": 1}
    assert resumed("accumulated_as_one", changes).losses() == pytest.approx(whole.losses(), abs=1e-3)


@pytest.mark.slow
def test_two_processes_accumulate_like_one_large_batch(runs, trained):
    """At a learning rate at which rounding does not grow: at that of the other runs tenfold every few steps."""
    options = {
        "runner_config.epochs": 1,
        "lr_schedule.learning_rate": 1e-4,
        "load_checkpoint": trained.checkpoint(f"glm32k_rank_0-4_{SAVED - 24}.ckpt"),
    }
    one = succeeded(runs.run("large_batch", FINETUNE, options))
    split = {"runner_config.batch_size": BATCH // 4, "runner_config.gradient_accumulation_steps": 2}
    two = succeeded(runs.run_two_processes("accumulated_two", FINETUNE, {**options, **split, "use_parallel": True}))
    assert len(one.losses()) == len(two.losses()) == ROWS // BATCH
    assert one.losses() == pytest.approx(two.losses(), rel=1e-4)
    norms = [[row["global_norm"] for row in run.curve()] for run in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
def test_two_processes_evaluate_all_records_alike(runs, trained):
    """13 records, which neither batches nor processes divide; their answers have one and four words."""
    write_rows(runs.folder / "eval13.jsonl", 13, seed=2)
    options = {
        "run_mode": "eval",
        "load_checkpoint": trained.checkpoint(f"glm32k_rank_0-4_{SAVED - 24}.ckpt"),
        "eval_dataset.data_loader.dataset_dir": runs.folder / "eval13.jsonl",
    }
    found = [perplexities(succeeded(runs.run("evaluated_one", FINETUNE, {**options, "runner_config.batch_size": 13})))]
    split = {"runner_config.batch_size": 3}
    found.append(perplexities(succeeded(runs.run("evaluated_threes", FINETUNE, {**options, **split}))))
    split["use_parallel"] = True
    found.append(perplexities(succeeded(runs.run_two_processes("evaluated_two", FINETUNE, {**options, **split}))))
    (expected,), (threes,), both = found
    assert threes == pytest.approx(expected, rel=1e-5) and len(both) >= 1
    for values in both:
        assert values == pytest.approx(expected, rel=1e-5)


# --- prediction ---


def test_three_prompts_in_batches_of_two(follow_ups):
    assert succeeded(follow_ups("predict")).answers() == ["yes", "no it is 42", "yes"]


def test_sampling_of_two_prompts_in_a_batch_of_eight(follow_ups):
    run = succeeded(follow_ups("sample"))
    assert run.answers() == ["yes", "no it is 42"]  # the model is sure of itself


# --- LoRA ---


def test_lora_trains_the_adapters_alone(trained, follow_ups):
    run = succeeded(follow_ups("lora")[0])
    before, after = (ms.load_checkpoint(str(found.checkpoint())) for found in (trained, run))
    adapters = [name for name in after if "mindpet_delta" in name and not name.startswith("adam_")]
    assert len(adapters) == 4 and all("query_key_value" in name for name in adapters)
    assert all(np.abs(after[name].asnumpy()).max() > 0 for name in adapters)  # one of each pair starts at zero
    weights = [name for name in before if name.startswith("transformer.")]
    assert len(weights) > 10
    for name in weights:
        assert np.array_equal(before[name].asnumpy(), after[name].asnumpy()), name
    states = [name for name in after if name.startswith(("adam_m.", "adam_v."))]
    assert states and all("mindpet_delta" in name for name in states)


def test_a_fixed_loss_scale_stays(follow_ups):
    assert {row["loss_scale"] for row in succeeded(follow_ups("lora")[0]).curve()} == {1024.0}


def test_lora_predicts(follow_ups):
    assert succeeded(follow_ups("lora")[1]).answers() == ["yes", "no it is 42"]

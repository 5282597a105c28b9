"""`glm32k check` and the launcher refuse the same mistakes, with the same words, before anything is built."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from mindformers_glm32k import run_mindformer
from mindformers_glm32k.cli import main as glm32k
from mindformers_glm32k.preflight.findings import value_at

FOLDER = ROOT / "research" / "glm32k"
TRAIN, LORA, PREDICT = (
    f"{kind}_tiny_cpu.yaml" for kind in ("finetune_glm32k", "finetune_glm32k_lora", "predict_glm32k")
)
GONE = object()  # a key to take out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Vocabulary and records of `glm32k make-data`."""
    folder = tmp_path_factory.mktemp("data")
    assert glm32k(["make-data", "--output_dir", str(folder), "--samples", "48", "--eval_samples", "16"]) == 0
    return folder


@pytest.fixture
def written(data, tmp_path, monkeypatch):
    """A function that writes a shipped YAML with data and changes, and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(changes, name=TRAIN, with_data=True):
        config = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
        vocab_file, train, evaluation = (str(data / file) for file in ("tokenizer.model", "train.jsonl", "eval.jsonl"))
        if with_data:
            config["processor"]["tokenizer"]["vocab_file"] = vocab_file
            for section, file in (("train_dataset", train), ("eval_dataset", evaluation)):
                if section in config:
                    config[section]["tokenizer"] = {"type": "GLM32KTokenizer", "vocab_file": vocab_file}
                    config[section]["data_loader"]["dataset_dir"] = file
                    config[f"{section}_task"]["dataset_config"] = config[section]
        for key, value in changes.items():
            parent, _, leaf = key.rpartition(".")
            section = value_at(config, parent) if parent else config
            if value is GONE:
                del section[leaf]
            else:
                section[leaf] = copy.deepcopy(value)
        with open("run.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(config, file, sort_keys=False)
        return "run.yaml"

    return write


def check(capsys, *argv):
    """Exit status and findings of the command."""
    capsys.readouterr()
    status = glm32k(["check", "--json", "--config", *map(str, argv)])
    return status, json.loads(capsys.readouterr().out)["findings"]


def errors(findings):
    return [finding for finding in findings if finding["severity"] == "error"]


MISTAKES = {
    # misspelt and misplaced keys: key as written -> (value, words that the finding must have)
    "load_checkpiont": ("x", "load_checkpoint"),
    "resume_trainning": (True, "resume_training"),
    "batch_size": (8, "runner_config.batch_size"),
    "learning_rate": (1e-4, "lr_schedule.learning_rate"),
    "epochs": (3, "runner_config.epochs"),
    "model.seq_length": (256, "model.model_config.seq_length"),
    "context.max_device_memroy": ("59GB", "max_device_memory"),
    "parallel.enable_parallel_optimiser": (True, "enable_parallel_optimizer"),
    "train_dataset.pack": (True, "packing"),
    "train_dataset.data_loader.shufle": (True, "shuffle"),
    "train_dataset.tokenizer.vocab_fil": ("x", "vocab_file"),
    "parallel_config.data_paralel": (1, "data_parallel"),
    "parallel_config.tensor_model_parallel": (1, "model_parallel"),
    "runner_config.epoch": (1, "epochs"),
    "trainer.model_nam": ("x", "model_name"),
    "optimizer.weigth_decay": (0.1, "weight_decay"),
    "callbacks.2.save_checkpoint_step": (5, "save_checkpoint_steps"),
    "runner_wrapper.use_clip_gard": (True, "use_clip_grad"),
    "model.model_config.num_layer": (2, "num_layers"),
    "lr_schedule.warmup_step": (2, "warmup_steps"),
    "runner_wrapper.scale_sense.scale_factor": (GONE, "needs it"),
    "lr_schedule": (None, "a section of keys is needed"),
    "optimizer": (None, "a section of keys is needed"),
    # wrong types and ranges
    "callbacks.2.save_checkpoint_steps": ("5", "whole number of at least 1"),
    "callbacks.2.keep_checkpoint_max": (0, "whole number of at least 1"),
    "load_checkpoint": (["a"], "the path of a file or folder"),
    "resume_training": ("yes", "true, false or"),
    "output_dir": (5, "the path of a folder"),
    "context.mode": ("graph", "0 (graph mode) or 1"),
    "context.device_target": ("cpu", "Ascend or CPU"),
    "lr_schedule.warmup_ratio": (2.0, "a number from 0 to 1"),
    "parallel_config.data_parallel": (0, "whole number of at least 1"),
    "callbacks": ("none", "a list of callbacks"),
    "seed": ("x", "whole number"),
    "train_dataset.max_source_length": ("long", "whole number of at least 1"),
    "train_dataset.packing": ("x", "neither True nor False"),
    "train_dataset.input_columns": (5, "a list of names"),
    "train_dataset.data_loader.dataset_dir": (["a"], "the path of a file or folder"),
    "parallel.full_batch": ("x", "true or false"),
    "parallel": (5, "a section of keys is needed"),
    "runner_wrapper.scale_sense.scale_window": ("x", "a number of at least 1"),
    # of classes
    "metric.type": ("ADGENMetric", "PerplexityMetric"),
    "optimizer.type": ("FP32StateAdamWeightDecay", "AdamW"),
    "train_dataset.data_loader.type": ("ADGenDataLoader", "GLM32KDataLoader"),
    "train_dataset.tokenizer.type": ("ChatGLM32kTokenizer", "GLM32KTokenizer"),
    # keys that need another
    "auto_trans_ckpt": (True, "use_parallel"),
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_is_named_by_the_command_and_by_the_launcher(key, written, capsys):
    value, words = MISTAKES[key]
    path = written({key: value})
    status, findings = check(capsys, path)
    found = errors(findings)
    assert status == 1 and key in [finding["key"] for finding in found], findings
    (one,) = (finding for finding in found if finding["key"] == key)
    assert words in one["message"] + one["fix"]
    assert len(found) == 1, found
    assert run_mindformer.main(["--config", path]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert key in line and words in line


@pytest.mark.parametrize(
    "option, words",
    [
        ("--load_checkpiont=x", "load_checkpoint"),
        ("--learning_rate=1e-4", "lr_schedule.learning_rate"),
        ("--context.max_device_memroy=59GB", "max_device_memory"),
        ("--train_dataset.pack=True", "packing"),
        ("--lr_schedule.warmup_ratio=2.0", "a number from 0 to 1"),
        ("--lr_schedule=null", "a section of keys"),
    ],
)
def test_mistakes_of_the_command_line(option, words, written, capsys):
    path = written({})
    status, findings = check(capsys, path, option)
    assert status == 1 and any(words in one["message"] + one["fix"] for one in errors(findings)), findings
    assert run_mindformer.main(["--config", path, option]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, changes, options, key, words",
    [
        (TRAIN, {"resume_training": True}, [], "resume_training", "random weights"),
        (TRAIN, {"run_mode": "eval"}, [], "load_checkpoint", "--random_weights True"),
        (PREDICT, {}, ["--predict_data", "a"], "load_checkpoint", "--random_weights True"),
        (LORA, {}, [], "load_checkpoint", "--random_weights True"),
        (
            LORA,
            {"model.model_config.pet_config.target_modules": ".*nothing.*", "random_weights": True},
            [],
            "model.model_config.pet_config.target_modules",
            "matches no cell",
        ),
        (
            PREDICT,
            {"model.model_config.use_past": False, "random_weights": True},
            ["--predict_data", "a"],
            "model.model_config.use_past",
            "use_flash_attention: False",
        ),
        (TRAIN, {"output_dir": "/dev/null/output"}, [], "output_dir", "/dev/null/output cannot be written"),
        (TRAIN, {"monitor_config": {"monitor_on": True}}, [], "monitor_config.monitor_on", "without a CPU kernel"),
        (
            TRAIN,
            {"do_eval": True, "eval_dataset.data_loader.dataset_dir": ""},
            [],
            "eval_dataset.data_loader.dataset_dir",
            "do_eval",
        ),
    ],
)
def test_keys_that_need_another(name, changes, options, key, words, written, capsys):
    path = written(changes, name)
    status, findings = check(capsys, path)
    found = errors(findings)
    assert status == 1 and [finding["key"] for finding in found] == [key], findings
    assert words in found[0]["message"] + found[0]["fix"]
    assert run_mindformer.main(["--config", path, *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", [LORA, PREDICT])
def test_random_weights_where_they_are_meant(name, written, capsys):
    assert check(capsys, written({"random_weights": True}, name))[0] == 0


def test_several_mistakes_come_at_once(written, capsys):
    path = written({"load_checkpiont": "x", "seed": "x", "callbacks.2.keep_checkpoint_max": 0})
    found = errors(check(capsys, path)[1])
    assert {finding["key"] for finding in found} == {"load_checkpiont", "seed", "callbacks.2.keep_checkpoint_max"}
    assert all(set(finding) == {"severity", "key", "message", "fix"} for finding in found)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_shipped_yamls_have_no_finding(name, capsys):
    for mode in ("predict",) if name.startswith("predict") else ("finetune", "eval"):
        assert check(capsys, FOLDER / name, "--run_mode", mode) == (0, [])


def test_a_pipeline_that_is_not_told_to_interleave(capsys):
    path, parts = FOLDER / "finetune_glm32k.yaml", ["--model.model_config.pp_interleave_num", "2"]
    status, findings = check(capsys, path, *parts)
    (one,) = findings
    assert status == 0 and one["severity"] == "warning" and one["key"] == "model.model_config.pp_interleave_num"
    assert "2 without parallel.pipeline_config.pipeline_interleave" in one["message"]
    offset = ["--model.model_config.offset", "[[1,1,0,0],[0,0,1,1]]"]
    told = ["--parallel.pipeline_config", "{pipeline_interleave: True, pipeline_scheduler: 1f1b}"]
    assert check(capsys, path, *parts, *offset, *told) == (0, [])


def test_pynative_mode_on_mindformers_2(written, capsys, monkeypatch):
    from mindformers_glm32k import compat

    path = written({"context.mode": 1})
    monkeypatch.setattr(compat, "pynative_is_upstreams", lambda: True)
    status, findings = check(capsys, path)
    assert status == 1 and errors(findings)[0]["key"] == "context.mode"


def test_versions_that_do_not_go_together(written, capsys, monkeypatch):
    from mindformers_glm32k import compat

    path = written({})
    monkeypatch.setattr(compat, "mindspore_version", lambda: "2.3.0")
    status, findings = check(capsys, path)
    (one,) = (finding for finding in findings if finding["key"] == "MindSpore")
    assert status == 0 and one["severity"] == "warning" and "2.3.0" in one["message"]


# --- data, steps, disk ---


def test_records_steps_and_disk(written, capsys):
    status, findings = check(capsys, written({"callbacks.2.save_checkpoint_steps": 5}))
    texts = {finding["key"]: finding["message"] + finding["fix"] for finding in findings}
    assert status == 0
    assert "6 steps an epoch (48 records, 8 a step), 12 in 2 epochs" in texts["runner_config.epochs"]
    assert "after step 5, 2 in all" in texts["callbacks.2.save_checkpoint_steps"]
    assert "2 checkpoints of" in texts["callbacks.2.keep_checkpoint_max"]
    assert "48 records" in texts["train_dataset"] and "padding" in texts["train_dataset"]


def test_truncated_records_and_packing(written, capsys):
    status, findings = check(
        capsys, written({"train_dataset.max_source_length": 100, "callbacks.2.save_checkpoint_steps": 50})
    )
    texts = {finding["key"]: (finding["severity"], finding["message"]) for finding in findings}
    severity, message = texts["train_dataset.max_source_length"]
    assert status == 0 and severity == "warning" and "48 truncated (middle)" in message
    assert "beyond the run's 12 steps" in texts["callbacks.2.save_checkpoint_steps"][1]


def test_padding_that_packing_would_save(written, capsys, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"content": "a", "summary": "b"}\n' * 40, encoding="utf-8")
    path = written({})
    _, findings = check(capsys, path, "--train_dataset_dir", str(tmp_path / "short.jsonl"))
    (one,) = (finding for finding in findings if finding["key"] == "train_dataset.packing")
    assert "9" in one["message"] and "% padding" in one["message"] and "records into a sequence" in one["fix"]


def test_large_data_is_sampled_and_said_to_be(written, capsys, tmp_path):
    (tmp_path / "many.jsonl").write_text('{"content": "a", "summary": "b"}\n' * 1000, encoding="utf-8")
    _, findings = check(capsys, written({}), "--train_dataset_dir", str(tmp_path / "many.jsonl"))
    assert any("400 records looked at of 1000" in finding["message"] for finding in findings)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"train_dataset.data_loader.dataset_dir": "gone.jsonl"}, "train_dataset.data_loader.dataset_dir"),
        ({"train_dataset.tokenizer.vocab_file": "gone.model"}, "train_dataset.tokenizer.vocab_file"),
        ({"load_checkpoint": "gone.ckpt"}, "load_checkpoint"),
        ({"model.model_config.padded_vocab_size": 300}, "train_dataset"),
        ({"train_dataset.max_source_length": 1000}, "train_dataset.max_source_length"),
    ],
)
def test_files_and_sizes(changes, key, written, capsys):
    status, findings = check(capsys, written(changes))
    assert status == 1 and [finding["key"] for finding in errors(findings)] == [key], findings


def test_layouts(written, capsys):
    changes = {"parallel_config.model_parallel": 3, "use_parallel": True, "parallel.parallel_mode": 1}
    status, findings = check(capsys, written(changes))
    assert status == 1
    assert any("num_attention_heads" in finding["key"] for finding in errors(findings)), findings


# --- the mended YAML ---


OLD = {
    "auto_tune": False,
    "filepath_prefix": "./autotune",
    "context.enable_graph_kernel": False,
    "model.model_config.type": "ChatGLM32kConfig",
    "model.arch.type": "ChatGLM32kForConditionalGeneration",
    "trainer.type": "CausalLanguageModelingTrainer",
    "train_dataset.data_loader.type": "ADGenDataLoader",
    "train_dataset.tokenizer.type": "ChatGLM3Tokenizer",
    "train_dataset_task.type": "KeyWordGenDataset",
    "runner_wrapper": {
        "type": "MFTrainOneStepCell",
        "use_clip_grad": True,
        "scale_sense": {
            "type": "DynamicLossScaleUpdateCell",
            "loss_scale_value": 65536,
            "scale_factor": 2,
            "scale_window": 1000,
        },
    },
    "optimizer": {"type": "FP32StateAdamWeightDecay", "beta1": 0.9, "beta2": 0.95, "eps": "1.e-8"},
    "callbacks": [
        {"type": "MFLossMonitor"},
        {"type": "CheckpointMointor", "save_checkpoint_steps": "5", "keep_checkpoint_max": 1},
        {"type": "ObsMonitor", "keep_last": False},
    ],
    "load_checkpiont": "",
    "epochs": 1,
    "runner_config.epochs": GONE,
}


def test_fix_writes_a_yaml_beside_that_has_no_errors(written, capsys):
    path = written(OLD)
    before = Path(path).read_text(encoding="utf-8")
    assert glm32k(["check", "--config", path, "--fix"]) == 1
    said = capsys.readouterr().out
    assert Path(path).read_text(encoding="utf-8") == before
    assert "wrote run_fixed.yaml" in said and "mended: optimizer.type: set to 'AdamW'" in said
    status, findings = check(capsys, "run_fixed.yaml")
    assert status == 0, errors(findings)
    fixed = yaml.safe_load(Path("run_fixed.yaml").read_text(encoding="utf-8"))
    assert fixed["optimizer"] == {"type": "AdamW", "eps": 1e-8, "betas": [0.9, 0.95]}
    assert fixed["callbacks"][1]["save_checkpoint_steps"] == 5 and len(fixed["callbacks"]) == 2
    assert fixed["runner_config"]["epochs"] == 1 and "epochs" not in fixed
    text = Path("run_fixed.yaml").read_text(encoding="utf-8")
    assert "#   epochs: moved to runner_config.epochs" in text
    # never over a file
    assert glm32k(["check", "--config", path, "--fix"]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_mended_yaml_trains(written, capsys):
    assert glm32k(["check", "--config", written(OLD), "--fix"]) == 1
    order = [sys.executable, "-m", "mindformers_glm32k.run_mindformer", "--config", "run_fixed.yaml"]
    run = subprocess.run(order, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert list(Path("output/checkpoint/rank_0").glob("*-1_*.ckpt"))


def test_json_is_all_that_is_printed(written):
    """By a process of its own: MindFormers logs while it is imported."""
    order = [sys.executable, "-m", "mindformers_glm32k", "check", "--json", "--config", written({"seed": "x"})]
    run = subprocess.run(order, capture_output=True, text=True, timeout=100)
    assert run.returncode == 1 and [one["key"] for one in json.loads(run.stdout)["findings"]] == ["seed"]


def test_fix_without_anything_to_mend(written, capsys):
    path = written({})
    assert glm32k(["check", "--config", path, "--fix"]) == 0
    assert "no file written" in capsys.readouterr().out


def test_the_launcher_refuses_an_old_yaml_in_one_line(written, capsys):
    assert run_mindformer.main(["--config", written(OLD)]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    for words in ("write GLM32KConfig", "write AdamW", "write GLM32KDataset", "write CheckpointMonitor"):
        assert words in line


def test_deep_adds_the_dry_run(written, capsys, monkeypatch):
    from mindformers_glm32k.commands import dryrun

    seen = []
    monkeypatch.setattr(dryrun, "run", lambda args: seen.append((args.config, args.overrides)) or 0)
    path = written({})
    assert glm32k(["check", "--config", path, "--deep", "--seed", "3"]) == 0
    assert seen == [(path, ["--seed", "3"])]
    path = written({"seed": "x"})  # nothing is compiled of what cannot start
    assert glm32k(["check", "--config", path, "--deep"]) == 1 and len(seen) == 1

"""The launcher's options and override rules; what a run does is in test_training_runs.py."""

import ctypes
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.run_mindformer import OVERRIDES, build_parser, main, read_config

YAML = str(ROOT / "research" / "glm32k" / "finetune_glm32k_tiny_cpu.yaml")
PREDICT_YAML = str(ROOT / "research" / "glm32k" / "predict_glm32k_tiny_cpu.yaml")

# the options of run_mindformer.py in MindFormers' source repository, branches r1.6.0 to r1.8.0
UPSTREAM_OPTIONS = [
    "config",
    "mode",
    "device_id",
    "device_target",
    "run_mode",
    "do_eval",
    "train_dataset_dir",
    "eval_dataset_dir",
    "predict_data",
    "modal_type",
    "predict_batch_size",
    "adapter_id",
    "load_checkpoint",
    "src_strategy_path_or_dir",
    "auto_trans_ckpt",
    "transform_process_num",
    "only_save_strategy",
    "resume_training",
    "strategy_load_checkpoint",
    "remote_save_url",
    "seed",
    "use_parallel",
    "profile",
    "options",
    "epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "sink_mode",
    "num_samples",
    "output_dir",
    "register_path",
    "do_sample",
    "trust_remote_code",
]


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch):
    """--register_path writes into the process."""
    monkeypatch.setenv("REGISTER_PATH", "")
    monkeypatch.setattr(sys, "path", list(sys.path))


def value_of(config, dotted):
    for key in dotted.split("."):
        config = config[key]
    return config


def write_yaml(text, name="run.yaml"):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def read(*options, config=YAML):
    return read_config(["--config", config, *options])


def assert_refused(capsys, argv, *words):
    """main prints one error line that has all the words, without a traceback, and returns 2."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("error: "))
    assert "Traceback" not in error
    for word in words:
        assert word in line, line


def test_the_options_are_upstreams():
    assert sorted(
        name.lstrip("-")
        for action in build_parser()._actions
        for name in action.option_strings
        if name.startswith("--") and name != "--help"
    ) == sorted(UPSTREAM_OPTIONS)


TYPED = {int: ("3", 3), str: ("some/where", "some/where")}


@pytest.mark.parametrize("name, kind, key, _", OVERRIDES, ids=[entry[0] for entry in OVERRIDES])
def test_each_option_sets_its_key(name, kind, key, _, tmp_path):
    text, value = TYPED.get(kind, ("true", True))
    if name == "load_checkpoint":  # the one that is looked up at once
        text = value = str(tmp_path)
    assert value_of(read(f"--{name}", text), key) == value
    assert value_of(read(f"--{name}={text}"), key) == value


def test_options_that_are_left_out_change_nothing():
    from mindformers.tools.register import MindFormerConfig

    assert read() == MindFormerConfig(YAML)


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("FALSE", False), ("false", False)])
def test_booleans(text, value):
    assert read("--use_parallel", text).use_parallel is value
    assert read("--resume_training", text).resume_training is value


def test_resume_training_takes_a_name():
    assert read("--resume_training", "glm32k_rank_0-1_5.ckpt").resume_training == "glm32k_rank_0-1_5.ckpt"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--config"],
        ["--config", YAML, "--use_parallel", "maybe"],
        ["--config", YAML, "--use_parallel", "1"],
        ["--config", YAML, "--epochs", "two"],
        ["--config", YAML, "--run_mode", "dance"],
        ["--config", YAML, "--options", "epochs"],
    ],
)
def test_wrong_option_values_are_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert "usage: run_mindformer" in capsys.readouterr().err


# --- any other key, by its dotted name ---


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("1e-5", 1e-5),
        ("None", None),
        ("null", None),
        ("True", True),
        ("false", False),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("dir/with #sign", "dir/with #sign"),
        ("-1", -1),
        ("a=b", "a=b"),
        ("", None),
    ],
)
@pytest.mark.parametrize("joined", [False, True], ids=["--key value", "--key=value"])
def test_dotted_keys(text, value, joined):
    key = "--train_dataset.tokenizer.vocab_file"
    found = read(*([f"{key}={text}"] if joined else [key, text])).train_dataset.tokenizer.vocab_file
    assert found == value and type(found) is type(value)


def test_keys_at_the_top():
    config = read("--seed", "5", "--eval_step_interval", "9", "--train_precision_sync=True")
    assert (config.seed, config.eval_step_interval, config.train_precision_sync) == (5, 9, True)


def test_sections_and_lists_of_sections_become_configurations():
    """MindFormers reads them by attribute (`pet_config.pet_type`)."""
    config = read(
        "--model.model_config.pet_config",
        "{pet_type: lora, lora_rank: 8}",
        "--callbacks",
        "[{type: MFLossMonitor}, {type: CheckpointMonitor, save_checkpoint_steps: 5}]",
    )
    assert config.model.model_config.pet_config.pet_type == "lora"
    assert config.callbacks == [{"type": "MFLossMonitor"}, {"type": "CheckpointMonitor", "save_checkpoint_steps": 5}]


def test_an_item_of_a_list_is_reached_by_its_number():
    assert read("--callbacks.2.save_checkpoint_steps", "5").callbacks[2]["save_checkpoint_steps"] == 5
    assert read("--optimizer.betas.1", "0.99").optimizer.betas == [0.9, 0.99]
    with pytest.raises(InputError, match="--callbacks.7.type: callbacks has 3 items, numbered from 0; there is no 7"):
        read("--callbacks.7.type", "x")


def test_options_sets_keys_too():
    config = read("--options", "runner_config.epochs=4", "optimizer.eps=1e-6", "do_eval=True", "use_parallel=False")
    assert (config.runner_config.epochs, config.optimizer.eps) == (4, 1e-6)
    assert config.do_eval is True and config.use_parallel is False


def test_dotted_keys_come_last():
    assert read("--epochs", "3", "--options", "runner_config.epochs=4").runner_config.epochs == 4
    assert read("--runner_config.epochs", "5", "--epochs", "3").runner_config.epochs == 5


@pytest.mark.parametrize(
    "words, message",
    [
        (["--trian_dataset.batch_size", "3"], "has no section 'trian_dataset'; did you mean 'train_dataset'?"),
        (
            ["--train_dataset.data_loadr.shuffle", "True"],
            "--train_dataset.data_loadr.shuffle: train_dataset has no section 'data_loadr'; "
            "did you mean 'data_loader'?",
        ),
        (["--seed.value", "3"], "has no section 'seed'"),
        (["--options", "modl.x=1"], "--options modl.x: the configuration has no section 'modl'; did you mean 'model'?"),
        (["--epoch", "3"], "--epoch: no such option; did you mean --epochs?"),
        (["--load_checkpiont=x.ckpt"], "did you mean --load_checkpoint?"),
        (["--predict-data", "hello"], "did you mean --predict_data?"),
        (["--runner_config.epochs"], "--runner_config.epochs: a value is needed after it"),
        (["--runner_config.epochs", "--seed", "3"], "--runner_config.epochs: a value is needed after it"),
        (["stray"], "'stray': an option starting with -- is needed here"),
        (["--epochs", "3", "4"], "'4': an option starting with -- is needed here"),
        (["--a..b", "3"], "--a..b"),
        (["--=3"], "--=3"),
        (["--modal_type", "text"], "--modal_type: GLM32K is a text model"),
        (["--load_checkpoint", "nowhere.ckpt"], "load_checkpoint nowhere.ckpt: no such file or folder"),
        (["--options", "load_checkpoint=nowhere.ckpt"], "load_checkpoint nowhere.ckpt: no such file or folder"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert_refused(capsys, ["--config", YAML, *words], message)


def test_a_new_key_close_to_a_known_one_is_taken_with_a_warning(monkeypatch):
    """Keys that a YAML leaves out can be set, so a new one is no error."""
    import logging

    warnings = []
    monkeypatch.setattr(logging.getLogger("mindformers"), "warning", lambda text, *rest: warnings.append(text % rest))
    assert read("--optimizer.weight_decy", "0.1").optimizer.weight_decy == 0.1
    assert len(warnings) == 1 and "did you mean 'weight_decay'" in warnings[0]


# --- the YAML itself ---


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "a mapping of keys to values is needed, found list"),
        ("seed: 0\nmodel: {a: [1\n", "not YAML"),
        ("seed: 0\nrun_mode: finetune\n\tx: 1\n", "line 3"),
        (
            "run_mode: finetune\nrunner_config: {epoch: 3}\nmodel: {model_config: {}}\ntrainer: {type: x}\n",
            "unexpected key: epoch",
        ),
        ("run_mode: finetune\nrunner_config: 3\n", "should be a dict"),
        ("run_mode: finetune\ncallbacks: {type: x}\n", "should be a list"),
        ("run_mode: finetune\nmodel: {arch: {type: x}}\n", "missing a required key"),
    ],
)
def test_broken_yamls(text, message, capsys):
    assert_refused(capsys, ["--config", write_yaml(text)], "run.yaml: ", message)


@pytest.mark.parametrize("mode", ["run_mode: dance\n", ""])
def test_a_yaml_without_a_usable_run_mode(mode, capsys):
    with open(YAML, encoding="utf-8") as file:
        name = write_yaml(file.read().replace("run_mode: finetune\n", mode))
    assert_refused(capsys, ["--config", name], "run_mode is", "allowed are train, finetune, eval, predict")
    assert read("--run_mode", "eval", config=name).run_mode == "eval"


def test_a_yaml_that_is_not_there(capsys):
    assert_refused(capsys, ["--config", "none.yaml"], "--config none.yaml: no such file")
    assert_refused(capsys, ["--config", os.getcwd()], "is a folder")


def test_a_yaml_by_another_name(capsys):
    """MindFormers passes over files that do not end in .yaml or .yml without a word."""
    assert_refused(capsys, ["--config", write_yaml("seed: 0\n", "run.txt")], "run.txt", ".yaml")


def test_numbers_and_null_as_written():
    with open(YAML, encoding="utf-8") as file:
        text = file.read()
    text = text.replace("learning_rate: 2.0e-3", "learning_rate: 2e-3").replace("total_steps: -1", "total_steps: None")
    config = read(config=write_yaml(text))
    assert config.lr_schedule.learning_rate == 2e-3 and config.lr_schedule.total_steps is None


# --- options that do more than set one key ---


def test_register_path(tmp_path, monkeypatch):
    read("--register_path", "classes")
    assert os.environ["REGISTER_PATH"] == str(tmp_path / "classes")
    assert sys.path[-1] == str(tmp_path / "classes")


def test_num_samples_limits_both_data_sets():
    config = read("--num_samples", "12")
    assert config.train_dataset.data_loader.num_samples == config.eval_dataset.data_loader.num_samples == 12


def test_prompts():
    def predict(*options):
        return read("--predict_data", *options, config=PREDICT_YAML)

    assert predict("one").input_data == "one"
    assert predict("one", "two").input_data == ["one", "two"]
    assert predict(r"first\nsecond line").input_data == "first\nsecond line"
    config = predict("one", "--predict_batch_size", "2", "--adapter_id", "a")
    assert config.predict_batch_size == 2 and config.adapter_id == ["a"]
    assert read(config=PREDICT_YAML).input_data is None


def test_predict_options_do_not_touch_training():
    assert "input_data" not in {key for key, value in read("--predict_data", "one").items() if value is not None}


# --- the process ---


def test_help_is_quick_and_needs_nothing_heavy():
    code = (
        "import sys\nfrom mindformers_glm32k.run_mindformer import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'mindspore', 'mindformers', 'matplotlib', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert all(f"--{name}" in done.stdout for name in UPSTREAM_OPTIONS)
    assert seconds < 5  # 0.1 s on a quiet machine; with MindFormers imported it would be 5 to 10


def _without_privileges():
    """In a child before it starts its program: permissions of files hold for root, too."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.parametrize("logs", ["output/log", "elsewhere"])
def test_a_working_folder_that_cannot_be_written(logs, tmp_path):
    """With logs elsewhere MindFormers can be imported, and then writes into the working folder."""
    folder = tmp_path / "read-only"
    folder.mkdir(0o555)
    more = {"LOCAL_DEFAULT_PATH": str(tmp_path)} if logs == "elsewhere" else {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_DEF", "LOG_MF"))}
    done = subprocess.run(
        [sys.executable, "-m", "mindformers_glm32k.run_mindformer", "--config", YAML, "--output_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**environment, **more, "PYTHONPATH": str(ROOT)},
        preexec_fn=_without_privileges,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {folder}{'/output/log' if not more else ''}: cannot be written"), error
    assert "Traceback" not in done.stdout + done.stderr and not list(folder.iterdir())


def test_module_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "mindformers_glm32k.run_mindformer", "--config", "none.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config none.yaml: no such file") and "Traceback" not in done.stderr

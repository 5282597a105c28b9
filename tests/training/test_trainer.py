"""What GLM32KTrainer refuses before anything is built; its runs are in test_training_runs.py."""

import json

import numpy as np
import pytest
from conftest import ROOT

from mindformers_glm32k.run_mindformer import main, read_config
from mindformers_glm32k.training import trainer

FOLDER = ROOT / "research" / "glm32k"
IDS = 409  # of the small vocabulary, special tokens included


@pytest.fixture
def options(small_vocab_file, tmp_path, monkeypatch):
    """A function: the command line of a run that would work, of one of the tiny YAMLs."""
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "output"))
    monkeypatch.setenv("REGISTER_PATH", str(FOLDER))
    with open("data.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"content": f"what is {i}", "summary": "a word"}) + "\n" for i in range(8))

    def build(run="finetune"):
        words = [
            "--config",
            str(FOLDER / f"{'predict' if run == 'predict' else 'finetune'}_glm32k_tiny_cpu.yaml"),
            "--run_mode",
            run,
            "--model.model_config.padded_vocab_size",
            "512",
        ]
        for section in ("train_dataset", "eval_dataset", "processor"):
            words += [f"--{section}.tokenizer.vocab_file", str(small_vocab_file)]
        words += ["--train_dataset_dir", "data.jsonl", "--eval_dataset_dir", "data.jsonl", "--batch_size", "2"]
        return words + ([] if run == "finetune" else ["--random_weights", "True"])

    return build


def refused(argv, capsys):
    """The error that main prints; it must be one line without a traceback, and no checkpoint may be written."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "Starting Training Model" not in captured.out
    return next(line for line in captured.err.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("run", ["finetune", "eval", "predict"])
def test_a_vocabulary_larger_than_the_model(run, options, capsys):
    words = options(run) + ["--model.model_config.padded_vocab_size", str(IDS - 1)]
    if run == "predict":
        words += ["--predict_data", "what is 3"]
    error = refused(words, capsys)
    assert f"has {IDS} ids" in error and f"padded_vocab_size={IDS - 1}" in error and "tokenizer.model" in error


@pytest.mark.parametrize(
    "run, section",
    [("finetune", "train_dataset"), ("eval", "eval_dataset"), ("finetune --do_eval True", "eval_dataset")],
)
def test_sequences_longer_than_the_model(run, section, options, capsys):
    run, *more = run.split()
    error = refused(options(run) + more + [f"--{section}.max_source_length", "241"], capsys)
    assert error.startswith(
        f"error: {section}: sequences have 257 tokens (max_source_length 241 + max_target_length 15 + 1), "
        "more than model_config.seq_length=256"
    )


def test_sequences_longer_than_their_own_length(options, capsys):
    error = refused(options() + ["--train_dataset.seq_length", "200"], capsys)
    assert "seq_length=200 is smaller than max_source_length=240 + max_target_length=15 + 1" in error


@pytest.mark.parametrize(
    "option, words",
    [
        ("--train_dataset.max_source_length=long", "max_source_length: 'long' is not a whole number"),
        ("--train_dataset.max_source_length=1.5", "max_source_length: 1.5 is not a whole number"),
        ("--train_dataset.max_target_length=None", "max_target_length: None is not a whole number"),
        ("--train_dataset.batch_siz=3", "unknown key 'batch_siz', did you mean 'batch_size'?"),
        ("--train_dataset.data_loader.shufle=True", "unknown key 'shufle', did you mean 'shuffle'?"),
        ("--train_dataset.data_loader.shuffle=3", "data_loader.shuffle: 3 is neither True nor False"),
        (
            "--train_dataset.data_loader.origin_columns=[content]",
            "origin_columns: ['content'] is not a list of two names",
        ),
        ("--train_dataset.tokenizer.vocab_file=none.model", "vocabulary file none.model: no such file"),
        ("--train_dataset_dir=none.jsonl", "data file none.jsonl: no such file"),
        ("--model.model_config.seq_length=long", "GLM32KConfig: seq_length='long': allowed is an integer >= 1"),
        ("--model.model_config.seq_length=None", "seq_length=None"),
        ("--model.model_config.padded_vocab_size=many", "padded_vocab_size='many'"),
        ("--model.model_config.num_layer=2", "unknown key 'num_layer', did you mean 'num_layers'?"),
        ("--model.model_config.qkv_concat=3", "qkv_concat=3: allowed is true or false"),
        ("--runner_config.epochs=two", "runner_config.epochs: 'two' is not a whole number of at least 1"),
        ("--runner_config.epochs=1.5", "runner_config.epochs: 1.5"),
        ("--runner_config.epochs=0", "runner_config.epochs: 0"),
        ("--runner_config.epochs=True", "runner_config.epochs: True"),
        ("--runner_config.epochs=None", "epochs: None"),
        ("--runner_config.batch_size=big", "runner_config.batch_size: 'big' is not a whole number of at least 1"),
        ("--runner_config.sink_mode=maybe", "runner_config.sink_mode: 'maybe' is not true or false"),
        ("--runner_config.sink_size=0", "runner_config.sink_size: 0"),
        ("--lr_schedule.learning_rate=fast", "lr_schedule.learning_rate: 'fast' is not a number"),
        ("--lr_schedule.learning_rate=-1.0", "lr_schedule.learning_rate: -1.0"),
        ("--lr_schedule.warmup_steps=x", "lr_schedule.warmup_steps: 'x'"),
        ("--lr_schedule.type=polynomal", "no lr class is registered as 'polynomal', did you mean 'polynomial'?"),
        ("--optimizer.betas=3", "optimizer.betas: 3 is not a list of two numbers between 0 and 1"),
        ("--optimizer.weight_decay=0", "optimizer.weight_decay: 0 is not a number of at least 0, written with"),
        (
            "--optimizer.type=FP32StateAdamWeightDecay",
            "optimizer.type: FP32StateAdamWeightDecay is an old name, or another model's; write AdamW",
        ),
        (
            "--optimizer.weight_decy=0.1",
            "optimizer.weight_decy: unknown key 'weight_decy', did you mean 'weight_decay'?",
        ),
        ("--runner_wrapper.scale_sense=large", "runner_wrapper.scale_sense: 'large'"),
        ("--runner_wrapper.max_grad_norm=x", "runner_wrapper.max_grad_norm: 'x'"),
        (
            "--runner_wrapper.max_grad_nrm=1.0",
            "runner_wrapper.max_grad_nrm: unknown key 'max_grad_nrm', did you mean 'max_grad_norm'?",
        ),
        ("--callbacks.1.per_print_time=3", "callbacks.1.per_print_time: GLM32KMonitor has no key 'per_print_time'"),
        ("--callbacks.1.per_print_times=x", "callbacks.1.per_print_times: 'x' is not a whole number"),
        (
            "--callbacks.2.type=CheckpointMonitr",
            "callbacks.2.type: no callback class is registered as 'CheckpointMonitr', "
            "did you mean 'CheckpointMonitor'?",
        ),
        ("--callbacks.0=text", "callbacks.0.type"),
        ("--train_dataset_task.type=Nope", "train_dataset_task.type: no dataset class is registered as 'Nope'"),
        ("--model.arch.type=Nope", "model.arch.type: no models class is registered as 'Nope'"),
        ("--use_parallel=True", "use_parallel: True needs several processes"),
        *[
            (f"--{section}={value}", f"{section}: a section of keys is needed, found {found}")
            for section in (
                "model",
                "model.model_config",
                "model.arch",
                "train_dataset",
                "train_dataset.tokenizer",
                "train_dataset.data_loader",
                "train_dataset_task",
                "optimizer",
                "lr_schedule",
                "runner_wrapper",
            )
            for value, found in (("None", "None"), ("text", "'text'"))
        ],
    ],
)
def test_wrong_values(option, words, options, capsys):
    assert words in refused(options() + [option], capsys)


def test_several_processes_that_would_each_do_everything(options, capsys, monkeypatch):
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    assert "add --use_parallel True" in refused(options(), capsys)


def test_everything_wrong_is_named_at_once(options, capsys):
    error = refused(options() + ["--runner_config.epochs=two", "--optimizer.betas=3", "--lr_schedule=None"], capsys)
    assert (
        "runner_config.epochs: 'two'" in error and "optimizer.betas: 3" in error and "lr_schedule: a section" in error
    )


def test_sections_of_other_runs_are_not_looked_at(options):
    """A YAML for training may lack what prediction needs, and the other way round."""
    from mindformers_glm32k.preflight import check_config

    broken_training = ["--train_dataset=None", "--optimizer=None", "--eval_dataset=None", "--runner_wrapper=None"]
    check_config(read_config(options("predict") + broken_training), "predict")
    check_config(read_config(options("eval") + ["--train_dataset=None", "--optimizer=None"]), "eval")
    check_config(read_config(options() + ["--processor=None", "--eval_dataset=None"]), "finetune")


def test_objects_stand_for_their_sections(options, small_vocab_file):
    """Trainer(dataset=…, optimizer=…, tokenizer=…) leaves the YAML's sections as they are."""
    from mindformers_glm32k.preflight import check_config
    from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer

    config = read_config(options() + ["--train_dataset=None", "--optimizer=None", "--lr_schedule=None"])
    check_config(config, "train", ("train_dataset", "optimizer", "lr_schedule"))
    config = read_config(options())
    config.train_dataset.tokenizer = GLM32KTokenizer(str(small_vocab_file))
    check_config(config, "train")


@pytest.mark.parametrize(
    "lines, words",
    [
        (
            '{"content": "a", "summary": "b"}\n{"content": "a", "summ',
            ("data.jsonl: line 2: broken JSON", "is the file cut off?"),
        ),
        ('{"content": "a", "summary": "b"}\n\n{"content": "a", "summary": "b"}\n', ("data.jsonl: line 2: empty line",)),
        ('{"content": "a", "summary": 3}\n', ("data.jsonl: line 1: column 'summary' is int",)),
        ("", ("data.jsonl: the file is empty",)),
    ],
)
def test_broken_data_is_named_by_its_line(lines, words, options, capsys):
    argv = options()
    with open("data.jsonl", "w", encoding="utf-8") as file:
        file.write(lines)
    error = refused(argv, capsys)
    assert all(word in error for word in words), error


def test_fewer_rows_than_a_batch(options, capsys):
    assert "8 records make no batch of batch_size=9" in refused(options() + ["--batch_size", "9"], capsys)


# --- prediction ---


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "no prompt to answer"),
        (["--predict_data", " "], "prompt 1 is empty"),
        (
            ["--predict_data", "hi", "--model.model_config.max_new_tokens", "256"],
            "model_config.max_new_tokens=256: no room for a prompt in seq_length=256",
        ),
        (["--predict_data", "hi", "--processor.tokenizer.vocab_file", "none.model"], "file none.model: no such file"),
        (["--predict_data", "hi", "--processor=None"], "processor: a section of keys is needed"),
    ],
)
def test_prediction(more, words, options, capsys):
    assert words in refused(options("predict") + more, capsys)


def test_labels_are_what_the_model_expects(options):
    """The data set that training builds: labels[i] is what follows input_ids[i], in the answer only."""
    from mindformers.dataset import build_dataset

    config = read_config(options())
    task = config.train_dataset_task
    task.dataset_config = config.train_dataset
    task.dataset_config.batch_size = 2
    batch = next(build_dataset(task).create_dict_iterator(num_epochs=1, output_numpy=True))
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (2, 256) and ids.dtype == labels.dtype == np.int32
    in_loss = labels != -100
    assert 0 < in_loss.sum() < 2 * 16
    rows, columns = np.nonzero(in_loss[:, :-1])
    assert (labels[rows, columns] == ids[rows, columns + 1]).all()


@pytest.mark.parametrize("run, section", [("finetune", "train_dataset"), ("eval", "eval_dataset")])
def test_packed_sequences_that_flash_attention_cannot_take_are_refused(run, section, options, capsys):
    error = refused(
        options(run)
        + [
            f"--{section}.packing",
            "True",
            "--model.model_config.cells",
            "ascend",
            "--model.model_config.attention_dropout",
            "0.1",
        ],
        capsys,
    )
    assert error.startswith("error: packing: model_config.attention_dropout=0.1")


@pytest.mark.parametrize("train, evaluation", [(True, True), (True, False), (False, True), (False, False)])
def test_packed_columns_reach_the_model_by_name(train, evaluation, options):
    config = read_config(options() + ["--train_dataset.packing", str(train), "--eval_dataset.packing", str(evaluation)])
    trainer._name_columns(config, ["train_dataset", "eval_dataset"])
    columns = ["input_ids", "labels", "input_mask", "position_ids", "document_ids"]
    for section in (config.train_dataset, config.eval_dataset):
        assert section.get("construct_args_key") == (columns if train or evaluation else None)
    assert config.train_dataset.input_columns == (columns if train else columns[:2])

"""Every YAML of research/glm32k: nothing in it that is ignored, and everything in it can be built."""

import importlib
import inspect
import json
import math
import re

import mindspore as ms
import pytest
import yaml
from conftest import ROOT

from mindformers_glm32k import registry
from mindformers_glm32k.data.dataset import KNOWN_KEYS, sequence_length
from mindformers_glm32k.data.loader import GLM32KDataLoader
from mindformers_glm32k.overrides import normalize_values
from mindformers_glm32k.preflight.run_config import check_config, constructor_keys
from mindformers_glm32k.run_mindformer import read_config

FOLDER = ROOT / "research" / "glm32k"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml"))
RUN_MODES = ("finetune", "eval", "predict")

# sections with a `type`, and MindFormers' category of the class it names; * stands for any name or number
CATEGORIES = {
    "trainer": "trainer",
    "model.model_config": "config",
    "model.arch": "models",
    "processor": "processor",
    "*.tokenizer": "tokenizer",
    "*.data_loader": "dataset_loader",
    "*_task.dataset_config.tokenizer": "tokenizer",
    "*_task.dataset_config.data_loader": "dataset_loader",
    "*_task": "dataset",
    "metric": "metric",
    "runner_wrapper": "wrapper",
    "runner_wrapper.scale_sense": "wrapper",
    "lr_schedule": "lr",
    "optimizer": "optimizer",
    "callbacks.*": "callback",
}
SMALL = {
    "num_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "padded_vocab_size": 512,
    "seq_length": 32,
    "param_init_type": "float32",
    "compute_dtype": "float32",
    "residual_dtype": "float32",
    "num_blocks": 8,
}


def raw(name):
    """The file as YAML reads it."""
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def leaves(node, path=""):
    """(dotted path, value) of every value that is no section and no list."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield path, node
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def sections(node, path=""):
    """(dotted path, section) of every section inside."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            yield inner, value
        yield from sections(value, inner)


def category_of(path):
    found = [
        category
        for pattern, category in CATEGORIES.items()
        if re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\w+"), path)
    ]
    return found[0] if found else None


def keys_of(category, name):
    """Keys that the class takes."""
    from mindformers.tools.register import MindFormerRegister

    return constructor_keys(MindFormerRegister.get_cls(category, name))[0]


@pytest.fixture(scope="module")
def host():
    """MindFormers' lists of the keys that it reads."""
    import mindformers  # noqa: F401, registers its classes
    from mindformers.tools.register import template

    try:
        arguments = importlib.import_module("mindformers.core.config_args")
    except ImportError:  # 1.6
        arguments = importlib.import_module("mindformers.trainer.config_args")
    return template, arguments


def test_there_are_yamls_for_every_kind_of_run():
    for kind in ("finetune_glm32k", "finetune_glm32k_lora", "predict_glm32k"):
        assert {f"{kind}.yaml", f"{kind}_tiny_cpu.yaml"} <= set(NAMES)


# --- values ---


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_null_are_what_they_look_like(name):
    """YAML 1.1 reads 1e-5 and None as texts; upstream's own launcher converts none before it builds a context."""
    values = raw(name)
    assert normalize_values(raw(name)) == values
    looks = re.compile(r"[-+.\d][\d.eE+-]*|none|null|true|false|yes|no", re.IGNORECASE)
    for path, value in leaves(values):
        assert not (isinstance(value, str) and looks.fullmatch(value)), path


@pytest.mark.parametrize("name", NAMES)
def test_no_placeholders(name):
    for path, value in leaves(raw(name)):
        if isinstance(value, str):
            assert not re.search(r"path/to|/your|<|>|\bxxx|todo|~/|^/|http", value, re.I), f"{path}: {value}"


@pytest.mark.parametrize("name", NAMES)
def test_lengths_fit(name):
    values = raw(name)
    model = values["model"]["model_config"]
    for section in ("train_dataset", "eval_dataset"):
        assert sequence_length(values[section]) <= model["seq_length"]
    assert model["multi_query_group_num"] == 2
    if model["use_past"]:
        assert model["num_blocks"] * model["block_size"] >= model["seq_length"] * model["batch_size"]
        assert model["max_new_tokens"] < model["seq_length"]


@pytest.mark.parametrize("name", [name for name in NAMES if "tiny" not in name])
def test_the_model_is_chatglm3_6b_32k(name, reference):
    published = json.loads((reference / "chatglm3-6b-32k_config.json").read_text(encoding="utf-8"))
    model = raw(name)["model"]["model_config"]
    same = (
        "num_layers",
        "padded_vocab_size",
        "hidden_size",
        "ffn_hidden_size",
        "kv_channels",
        "num_attention_heads",
        "multi_query_group_num",
        "seq_length",
        "rope_ratio",
        "layernorm_epsilon",
        "eos_token_id",
        "pad_token_id",
    )
    assert {key: model[key] for key in same} == {key: published[key] for key in same}


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_uses_the_devices_that_the_first_line_names(name):
    text = (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
    values = raw(name)
    layout = values["parallel_config"]
    product = math.prod(
        layout.get(key, 1) for key in ("data_parallel", "model_parallel", "context_parallel", "pipeline_stage")
    )
    numbers = {"one": 1, "two": 2, "eight": 8}
    named = re.search(r"on (\w+) NPU", text)
    devices = 1 if named is None else numbers.get(named[1]) or int(named[1])
    assert product == devices
    assert values["use_parallel"] == (devices > 1)
    assert values["context"]["device_target"] == ("CPU" if "tiny_cpu" in name else "Ascend")
    assert layout["micro_batch_num"] >= layout["pipeline_stage"]


@pytest.mark.parametrize("name", [name for name in NAMES if "tiny" in name])
def test_the_tiny_ones_have_the_keys_of_the_large_ones(name):
    """What one learns on the tiny model applies to the large one. The differences are the devices' own."""

    def keys(file):
        return {
            path
            for path, _ in leaves(raw(file))
            if not path.startswith(
                (
                    "context.",
                    "parallel.",
                    "parallel_config.",
                    "recompute_config.",
                    "micro_batch_interleave_num",
                    "model.model_config.residual_dtype",
                )
            )
        }

    assert keys(name) == keys(name.replace("_tiny_cpu", ""))


# --- anchors ---


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_takes_the_keys_of_training(name):
    """eval_dataset is written as a merge of train_dataset; every section stands in the file as it is read here."""
    values = raw(name)
    train, evaluation = values["train_dataset"], values["eval_dataset"]
    assert (train["data_loader"]["phase"], train["data_loader"]["shuffle"]) == ("train", True)
    assert evaluation == {**train, "data_loader": {**train["data_loader"], "phase": "eval", "shuffle": False}}
    assert len(evaluation) == 16 and len(evaluation["data_loader"]) == 6


@pytest.mark.parametrize("run_mode", ["finetune", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_an_override_changes_its_own_section_alone(name, run_mode):
    """Anchors make one object of a section in YAML; MindFormers gives each place one of its own."""
    other = {"finetune": "eval", "eval": "train"}[run_mode]
    used = "train" if run_mode == "finetune" else "eval"
    unchanged = raw(name)
    config = read_config(
        [
            *("--config", str(FOLDER / name), "--run_mode", run_mode),
            *(f"--{used}_dataset.packing", "True", f"--{used}_dataset.data_loader.dataset_dir", "a.jsonl"),
            *(f"--{used}_dataset.data_loader.origin_columns.0", "question"),
        ]
    )
    changed = config[f"{used}_dataset"]
    assert changed.packing is True and changed.data_loader.dataset_dir == "a.jsonl"
    assert changed.data_loader.origin_columns == ["question", "summary"]
    assert config[f"{other}_dataset"] == unchanged[f"{other}_dataset"]
    for kind in ("train", "eval"):
        assert config[f"{kind}_dataset_task"].dataset_config == unchanged[f"{kind}_dataset"]


# --- keys ---


@pytest.mark.parametrize("run_mode", RUN_MODES)
@pytest.mark.parametrize("name", NAMES)
def test_mindformers_reads_it(name, run_mode, host):
    """Its template knows every section; unknown keys of most sections are its own errors."""
    template, _ = host
    config = read_config(["--config", str(FOLDER / name), "--run_mode", run_mode])
    assert config.run_mode == run_mode
    known = {*template.GeneralConfig.keys(), *template.CONFIG_NAME_TO_CLASS}
    assert set(raw(name)) <= known


@pytest.mark.parametrize("name", NAMES)
def test_no_key_of_the_context_is_ignored(name, host):
    _, arguments = host
    known = {*arguments.ContextConfig.get_supported_kwargs(), *arguments.MFContextConfig.get_supported_kwargs()}
    assert set(raw(name)["context"]) <= known


@pytest.mark.parametrize("name", NAMES)
def test_mindspore_takes_the_parallel_section(name):
    modes = ("data_parallel", "semi_auto_parallel")
    section = raw(name)["parallel"]
    try:
        ms.set_auto_parallel_context(**{**section, "parallel_mode": modes[section["parallel_mode"]]})
        assert ms.get_auto_parallel_context("full_batch") == section["full_batch"]
    finally:
        ms.reset_auto_parallel_context()


@pytest.mark.parametrize("name", NAMES)
def test_every_type_is_registered_and_takes_its_keys(name, host):
    from mindformers.tools.register import MindFormerRegister

    typed = [(path, section) for path, section in sections(raw(name)) if "type" in section]
    assert len(typed) > 10
    for path, section in typed:
        category = category_of(path)
        assert category, path
        assert MindFormerRegister.is_exist(category, section["type"]), (path, section["type"])
        if category in ("wrapper", "lr", "optimizer", "callback", "processor"):
            assert set(section) - {"type"} <= keys_of(category, section["type"]), path


@pytest.mark.parametrize("name", NAMES)
def test_the_plugins_classes_know_all_of_their_keys(name):
    values = raw(name)
    assert set(values["trainer"]) == {"type", "model_name", "auto_register"}
    assert set(values["model"]) == {"model_config", "arch"} and set(values["model"]["arch"]) == {"type"}
    for section in (values["train_dataset"], values["eval_dataset"]):
        assert set(section) <= KNOWN_KEYS
        loader = inspect.signature(GLM32KDataLoader.__new__).parameters
        assert set(section["data_loader"]) - {"type"} <= set(loader)
        assert set(section["tokenizer"]) == {"type", "vocab_file"}
    for kind in ("train", "eval"):
        assert values[f"{kind}_dataset_task"] == {"type": "GLM32KDataset", "dataset_config": values[f"{kind}_dataset"]}
    file, _, cls = values["trainer"]["auto_register"].partition(".")
    assert (FOLDER / f"{file}.py").is_file() and cls == "GLM32KTrainer"


@pytest.mark.parametrize("name", [name for name in NAMES if "lora" in name])
def test_lora_keys(name):
    from mindformers.pet.pet_config import LoraConfig

    adapters = raw(name)["model"]["model_config"]["pet_config"]
    assert set(adapters) <= set(inspect.signature(LoraConfig.__init__).parameters) | {"pet_type"}
    assert LoraConfig(**{key: value for key, value in adapters.items() if key != "pet_type"}).lora_rank == 8


# --- building ---


@pytest.mark.parametrize("name", NAMES)
def test_the_model_config_validates_at_full_size(name):
    model = raw(name)["model"]["model_config"]
    config = registry.load("GLM32KConfig")(**model, cells="portable" if "tiny" in name else "ascend")
    assert config.num_layers == model["num_layers"] and config.seq_length == model["seq_length"]


@pytest.fixture
def small(small_vocab_file, tmp_path, monkeypatch):
    """Function of a YAML's name: its configuration at a small size, for one CPU, with data."""
    monkeypatch.setenv("REGISTER_PATH", str(FOLDER))
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "output"))
    with open("data.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"content": f"what is {i}", "summary": "word"}) + "\n" for i in range(8))
    ms.set_context(device_target="CPU", mode=ms.GRAPH_MODE)

    def load(name):
        values = {f"model.model_config.{key}": value for key, value in SMALL.items()}
        for kind in ("train", "eval"):
            values.update(
                {
                    f"{kind}_dataset.data_loader.dataset_dir": "data.jsonl",
                    f"{kind}_dataset.max_source_length": 20,
                    f"{kind}_dataset.tokenizer.vocab_file": small_vocab_file,
                    f"{kind}_dataset.max_target_length": 8,
                    f"{kind}_dataset.batch_size": 2,
                }
            )
        values["processor.tokenizer.vocab_file"] = small_vocab_file
        values["lr_schedule.total_steps"] = 100  # what the trainer puts in for -1
        return read_config(["--config", str(FOLDER / name), *(f"--{key}={value}" for key, value in values.items())])

    return load


@pytest.mark.parametrize("name", NAMES)
def test_everything_can_be_built(name, small):
    from mindformers.core import build_callback, build_lr, build_metric, build_optim
    from mindformers.dataset import build_dataset
    from mindformers.models.build_model import build_network
    from mindformers.models.build_processor import build_processor
    from mindformers.wrapper import build_wrapper

    config = small(name)
    check_config(config, "finetune")
    check_config(config, "eval")
    check_config(config, "predict")

    network = build_network(config.model)
    trainable = network.trainable_params()
    if "lora" in name:
        assert trainable and all("mindpet_delta" in parameter.name for parameter in trainable)
    else:
        assert type(network) is registry.load("GLM32KForConditionalGeneration")
        assert len(trainable) > 5

    schedule = build_lr(config.lr_schedule)
    last = float(schedule(ms.Tensor(100, ms.int32)).asnumpy())
    assert last == pytest.approx(config.lr_schedule.lr_end, rel=1e-3)
    optimizer = build_optim(config.optimizer, default_args={"params": trainable, "learning_rate": schedule})
    step = build_wrapper(config.runner_wrapper, default_args={"network": network, "optimizer": optimizer})
    assert type(step) is registry.load("GLM32KTrainOneStepCell")
    assert float(step.scale_sense.asnumpy()) == config.runner_wrapper.scale_sense.loss_scale_value

    callbacks = build_callback(config.callbacks)
    assert [type(callback).__name__ for callback in callbacks] == [callback["type"] for callback in config.callbacks]
    assert type(build_metric(config.metric)).__name__ == config.metric.type
    tokenizer = build_processor(config.processor).tokenizer
    assert type(tokenizer) is registry.load("GLM32KTokenizer") and tokenizer.vocab_size <= SMALL["padded_vocab_size"]

    for kind in ("train", "eval"):
        task = config[f"{kind}_dataset_task"]
        task.dataset_config = config[f"{kind}_dataset"]
        batch = next(build_dataset(task).create_tuple_iterator(num_epochs=1, output_numpy=True))
        assert [column.shape for column in batch] == [(2, 29), (2, 29)]

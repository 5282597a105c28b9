"""What the plugin adds to MindFormers, and how it gets there."""

import os
import pickle
import subprocess
import sys

import pytest
from conftest import ROOT

import mindformers_glm32k
from mindformers_glm32k import registry

HOOK_FOLDER = ROOT / "research" / "glm32k"


@pytest.fixture(scope="module")
def register():
    """MindFormerRegister after `import mindformers`; nothing else is called."""
    import mindformers  # noqa: F401
    from mindformers.tools.register import MindFormerRegister

    return MindFormerRegister


@pytest.fixture(scope="module")
def small_config():
    return mindformers_glm32k.GLM32KConfig(
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=48,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_group_num=2,
        padded_vocab_size=512,
        seq_length=32,
        param_init_type="float32",
        compute_dtype="float32",
    )


def run_python(code, **environment):
    """A fresh interpreter in the current folder; environment values replace those of this process, None removes."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=merged)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("category, name", [entry[:2] for entry in registry.ENTRIES])
def test_every_entry_is_registered(category, name, register):
    registered = register.get_cls(category, name)
    assert registered is getattr(mindformers_glm32k, name)
    assert registered.__name__ == name and registered.__module__.startswith("mindformers_glm32k.")


def test_no_name_is_one_of_upstreams(register):
    """MindFormers' registry overwrites silently; upstream's classes must still be its own."""
    ours = [
        (category, name)
        for category, classes in register.registry.items()
        for name, found in classes.items()
        if str(getattr(found, "__module__", "")).startswith("mindformers_glm32k")
    ]
    assert sorted(ours) == sorted(entry[:2] for entry in registry.ENTRIES)
    assert all(name.startswith("GLM32K") for _, name in ours)


def test_the_package_offers_the_entries():
    assert set(mindformers_glm32k.__all__) == {name for _, name, _ in registry.ENTRIES} <= set(dir(mindformers_glm32k))
    with pytest.raises(AttributeError, match="GLM33"):
        mindformers_glm32k.GLM33  # noqa: B018
    with pytest.raises(KeyError):
        registry.load("GLM33")


def test_registering_again_changes_nothing(register):
    before = {category: dict(classes) for category, classes in register.registry.items()}
    registry.register_all()
    registry.register_all()
    assert {category: dict(classes) for category, classes in register.registry.items()} == before


def test_another_class_of_the_same_name_is_not_overwritten(register, monkeypatch):
    monkeypatch.setitem(register.registry["models"], "GLM32KForConditionalGeneration", dict)
    with pytest.raises(RuntimeError, match="already has another models named GLM32KForConditionalGeneration"):
        registry.register_all()


# --- Auto classes and Trainer ---


def test_auto_config_and_models(small_config, register, tmp_path):
    from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM

    small_config.save_pretrained(str(tmp_path), save_json=True)
    config = AutoConfig.from_pretrained(str(tmp_path))
    assert type(config) is mindformers_glm32k.GLM32KConfig
    assert (config.num_layers, config.hidden_size, config.rope_ratio) == (1, 32, 50)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        assert type(auto_class.from_config(config)) is mindformers_glm32k.GLM32KForConditionalGeneration


def test_auto_tokenizer(small_vocab_file, small_config, register, tmp_path):
    from mindformers import AutoTokenizer

    tokenizer = mindformers_glm32k.GLM32KTokenizer(str(small_vocab_file))
    tokenizer.save_pretrained(str(tmp_path))
    small_config.save_pretrained(str(tmp_path), save_json=True)
    found = AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(found) is mindformers_glm32k.GLM32KTokenizer
    text = "some words 012"
    assert found.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("key", ["model", "model_name"])
def test_trainer_finds_its_yaml(key, register, monkeypatch):
    from mindformers import Trainer

    monkeypatch.setenv("REGISTER_PATH", str(HOOK_FOLDER))
    trainer = Trainer(task="text_generation", **{key: "glm32k"})
    assert trainer.config.trainer.type == "GLM32KTrainer"
    assert trainer.config.model.model_config.type == "GLM32KConfig"
    assert trainer.config.model.model_config.seq_length == 32768


# --- imports ---


def test_importing_the_package_is_cheap():
    """`glm32k --help` must not wait for MindFormers."""
    run_python(
        "import sys, mindformers_glm32k\n"
        "heavy = {'mindformers', 'mindspore', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


@pytest.mark.parametrize(
    "first",
    [
        "mindformers_glm32k, mindformers",
        "mindformers, mindformers_glm32k",
        "mindformers_glm32k.generation.prompts",
        "mindformers_glm32k.kernels.substitution",
    ],
)
def test_any_order_of_imports_registers(first):
    """Also modules that import mindformers themselves and are half loaded when it is."""
    run_python(
        f"import {first}\nfrom mindformers.tools.register import MindFormerRegister\n"
        "from mindformers_glm32k.registry import ENTRIES\n"
        "assert all(MindFormerRegister.is_exist(category, name) for category, name, _ in ENTRIES)"
    )


def test_a_pickled_tokenizer_can_come_first(small_vocab_file, tmp_path):
    """Worker processes of a data set unpickle it before anything else."""
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(mindformers_glm32k.GLM32KTokenizer(str(small_vocab_file))))
    out = run_python(
        "import pickle\ntokenizer = pickle.load(open('tokenizer.pickle', 'rb'))\nprint(tokenizer.encode('words'))"
    )
    assert out.splitlines()[-1] == str(mindformers_glm32k.GLM32KTokenizer(str(small_vocab_file)).encode("words"))


def test_auto_register_from_a_checkout_that_is_not_installed():
    """What `run_mindformer.py --register_path …/research/glm32k` does: the YAML's `trainer.auto_register`."""
    run_python(
        "import importlib.util, sys\n"
        # an editable installation would find the package by a finder of its own
        f"sys.path = [path for path in sys.path if path not in ('', {str(ROOT)!r})]\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "assert importlib.util.find_spec('mindformers_glm32k') is None\n"
        "from mindformers.tools.register import MindFormerModuleType, MindFormerRegister\n"
        "MindFormerRegister.auto_register('register_glm32k.GLM32KTrainer', module_type=MindFormerModuleType.TRAINER)\n"
        "from mindformers_glm32k.registry import ENTRIES\n"
        "assert all(MindFormerRegister.is_exist(category, name) for category, name, _ in ENTRIES)\n"
        f"assert sys.modules['mindformers_glm32k'].__file__.startswith({str(ROOT)!r})\n",
        PYTHONPATH=None,
        REGISTER_PATH=str(HOOK_FOLDER),
    )

"""`glm32k export`: the folder, what it is made of, and what keeps it from appearing."""

import importlib.util
import json

import numpy as np
import pytest
from weights.parallel import read_all, write_checkpoint

from mindformers_glm32k.cli import main
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.export import export, verify
from mindformers_glm32k.files import weights_digest
from mindformers_glm32k.tokenizer.chat_format import stop_ids
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from mindformers_glm32k.weights import convert, load_hf_weights, merge
from mindformers_glm32k.weights.checkpoint import read_file


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):
    file = tmp_path_factory.mktemp("trained") / "glm32k.ckpt"
    convert(reference / "tiny_hf" / "hf_safetensors_fp32", file)
    return file


@pytest.fixture(scope="module")
def exported(checkpoint, small_vocab_file, tmp_path_factory):
    """A folder written by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("served") / "model"
    status = main(
        ["export", "--load_checkpoint", str(checkpoint), "--tokenizer", str(small_vocab_file),
         "--output_dir", str(folder), "--max_shard_size", "300KB",
         "--manifest", str(checkpoint.with_suffix(".report.json"))]
    )  # fmt: skip
    assert status == 0
    return folder


def test_the_folder_holds_what_engines_read(exported, small_vocab_file, reference, checkpoint):
    names = {path.name for path in exported.iterdir()}
    assert names >= {
        *("README.md", "config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"),
    }
    assert sum(name.endswith(".safetensors") for name in names) > 1
    config = json.loads((exported / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 0.5
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == stop_ids(Vocabulary(small_vocab_file))
    ours, theirs = (
        {name: values.sum() for name, values in load_hf_weights(path)}
        for path in (exported, reference / "tiny_hf" / "hf_safetensors_fp32")
    )
    assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=1e-4)
    card = (exported / "README.md").read_text()
    assert weights_digest(checkpoint) in card and "largest difference 0 of" in card and "data manifest" in card
    assert not [path for path in exported.parent.iterdir() if path != exported]


def test_transformers_loads_it_offline(exported, small_vocab_file):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    assert type(AutoConfig.from_pretrained(str(exported))).__name__ == "GlmConfig"
    assert len(GenerationConfig.from_pretrained(str(exported)).eos_token_id) == 3
    vocabulary = Vocabulary(small_vocab_file)
    assert AutoTokenizer.from_pretrained(str(exported)).encode("a b", add_special_tokens=False) == vocabulary.encode(
        "a b"
    )


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_transformers_loads_the_model(exported):
    from transformers import AutoModelForCausalLM

    assert type(AutoModelForCausalLM.from_pretrained(str(exported))).__name__ == "GlmForCausalLM"


def test_bf16_is_within_rounding(checkpoint, small_vocab_file, tmp_path):
    report = export(checkpoint, tmp_path / "model", small_vocab_file, dtype="bf16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert 0 < float(report["verified"][1].split()[-4]) < 0.05


def test_other_logits_keep_the_folder_from_appearing(checkpoint, small_vocab_file, tmp_path, monkeypatch):
    found = verify._our_logits

    def spoilt(source, *more):
        return [values * (1.01 if source == checkpoint else 1) for values in found(source, *more)]

    monkeypatch.setattr(verify, "_our_logits", spoilt)
    with pytest.raises(InputError, match="differ from those of the checkpoint by 0.0099"):
        export(checkpoint, tmp_path / "model", small_vocab_file)
    assert [path.name for path in tmp_path.iterdir() if path.name != "output"] == []  # MindFormers' log


def test_too_little_memory_is_said(checkpoint, small_vocab_file, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_free_memory", lambda: 1000)
    report = export(checkpoint, tmp_path / "model", small_vocab_file)
    assert "logits not compared" in report["verified"][1]


def test_ranks_are_merged(checkpoint, small_vocab_file, tmp_path):
    for rank in (0, 1):
        (tmp_path / f"run/rank_{rank}").mkdir(parents=True)
        (tmp_path / f"run/rank_{rank}/checkpoint_{rank}.ckpt").write_bytes(checkpoint.read_bytes())
    config = tmp_path / "config.json"
    report = json.loads(checkpoint.with_suffix(".report.json").read_text())
    config.write_text(json.dumps(report["huggingface_config"]))
    export(tmp_path / "run", tmp_path / "model", small_vocab_file, config, merging={}, logits=False)
    export(checkpoint, tmp_path / "whole", small_vocab_file, logits=False)
    merged, whole = (dict(load_hf_weights(tmp_path / name)) for name in ("model", "whole"))
    assert merged.keys() == whole.keys() and all((merged[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--output_dir", "."], "exists already"),
        (["--lora"], "--lora is for a folder with rank_N"),
        (["--lora_only"], "--lora_only is for a folder with rank_N"),
        (["--tokenizer", ""], "tokenizer.model is needed"),
        (["--manifest", "nowhere.json"], "nowhere.json: no such file"),
        (["--seed", "1"], "--seed: no such option"),
        (["--torch_python", "/nowhere/python"], "--torch_python /nowhere/python: cannot be started"),
    ],
)
def test_bad_input_in_one_line(checkpoint, small_vocab_file, tmp_path, capsys, change, message):
    (tmp_path / "something").touch()
    options = {"--load_checkpoint": str(checkpoint), "--tokenizer": str(small_vocab_file), "--output_dir": "model"}
    arguments = [word for pair in options.items() for word in pair]
    assert main(["export", *arguments, *change]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert [path.name for path in tmp_path.iterdir() if path.name != "output"] == ["something"]


def test_adapters_of_a_run_through_the_command(checkpoint, small_vocab_file, tmp_path, capsys):
    """`--lora` gives the weights that the base has with the adapter of `--lora_only`, under the names of the folder."""
    tensors, rng = read_all(checkpoint), np.random.default_rng(0)
    for name in [name for name, (values, _) in tensors.items() if "layers" in name and values.ndim == 2]:
        rows, columns = tensors[name][0].shape
        for side, shape in (("a", (2, columns)), ("b", (rows, 2))):
            values = rng.standard_normal(shape).astype(np.float32)
            tensors[f"{name[: -len('weight')]}mindpet_delta_lora_{side}"] = values, "fp32"
    write_checkpoint(tmp_path / "run" / "rank_0" / "glm32k_rank_0-1_1.ckpt", tensors)
    config = tmp_path / "config.json"
    report = json.loads(checkpoint.with_suffix(".report.json").read_text())
    config.write_text(json.dumps(report["huggingface_config"]))
    options = ["--load_checkpoint", str(tmp_path / "run"), "--lora_scaling", "0.5", "--output_dir"]
    assert main(["export", *options, str(tmp_path / "adapter"), "--lora_only"]) == 0
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(fields["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    base, merged = tmp_path / "base", tmp_path / "merged.ckpt"
    assert main(["export", "--load_checkpoint", str(checkpoint), "--tokenizer", str(small_vocab_file),
                 "--no_logits", "--output_dir", str(base)]) == 0  # fmt: skip
    served = {tensor.name for path in base.glob("*.safetensors") for tensor in read_file(path)}
    adapted = {tensor.name.split(".lora_")[0] for tensor in read_file(tmp_path / "adapter/adapter_model.safetensors")}
    assert {name[len("base_model.model.") :] + ".weight" for name in adapted} <= served
    convert(base, merged, adapter=tmp_path / "adapter")
    merge(tmp_path / "run", tmp_path / "ours.ckpt", lora=True, lora_scaling=0.5)
    theirs, ours = ({tensor.name: tensor.load() for tensor in read_file(path) if tensor.shape}
                    for path in (merged, tmp_path / "ours.ckpt"))  # fmt: skip
    assert theirs.keys() == ours.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(theirs[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    assert main(["export", *options, str(tmp_path / "adapter"), "--lora_only"]) == 2
    assert "adapter: exists already" in capsys.readouterr().err


def test_a_vocabulary_that_is_too_large(checkpoint, reference, tmp_path):
    with pytest.raises(InputError, match="has 64798 tokens, the model 1024"):
        export(checkpoint, tmp_path / "model", reference / "tokenizer" / "tokenizer.model")
    assert not list(tmp_path.iterdir())

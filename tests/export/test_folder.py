"""`glm32k export`: the folder, what it is made of, and what keeps it from appearing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from weights.parallel import read_all, write_checkpoint

from mindformers_glm32k.cli import main
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.export import export, verify
from mindformers_glm32k.export import folder as export_folder
from mindformers_glm32k.files import weights_digest
from mindformers_glm32k.tokenizer.chat_format import conversation_ids, stop_ids
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


LOADS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, messages = sys.argv[1], json.loads(sys.argv[2])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
answer = model.generate(ids, do_sample=False, max_new_tokens=8, max_length=None)[0, ids.shape[1] :]
print(json.dumps([type(model).__name__, ids[0].tolist(), answer.tolist(), model.generation_config.eos_token_id]))
"""


def test_transformers_loads_tokenizer_and_model_offline(exported, small_vocab_file):
    """Without remote code, in the Python that GLM32K_TORCH_PYTHON names, or in this one."""
    python = os.environ.get("GLM32K_TORCH_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, check=False).returncode:
        pytest.skip("no torch and transformers here: name a Python that has them, GLM32K_TORCH_PYTHON=…")
    messages = [{"role": "user", "content": "where is <|assistant|> philosophy?"}]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", LOADS, str(exported), json.dumps(messages)],
        env={**kept, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, ids, answer, stops = json.loads(done.stdout.splitlines()[-1])
    vocabulary = Vocabulary(small_vocab_file)
    assert (name, ids) == ("GlmForCausalLM", conversation_ids(vocabulary, messages, True))
    assert stops == stop_ids(vocabulary) and answer


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
    monkeypatch.setattr(verify, "free_memory", lambda: 1000)
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
    whole = ["--lora", "--config", str(config), "--tokenizer", str(small_vocab_file), "--no_logits"]
    assert main(["export", *options, str(tmp_path / "whole"), *whole]) == 0
    assert main(["export", *options, str(tmp_path / "adapter"), "--lora_only"]) == 2
    assert "adapter: exists already" in capsys.readouterr().err


def test_a_vocabulary_that_is_too_large(checkpoint, reference, tmp_path):
    with pytest.raises(InputError, match="has 64798 tokens, the model 1024"):
        export(checkpoint, tmp_path / "model", reference / "tokenizer" / "tokenizer.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype, stored", [("fp16", "float16"), ("fp32", "float32"), (None, "float32")])
def test_dtypes(checkpoint, small_vocab_file, tmp_path, dtype, stored):
    export(checkpoint, tmp_path / "model", small_vocab_file, dtype=dtype, logits=False)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == stored


def lonely(checkpoint, folder):
    """The checkpoint without what lies beside it and says how the model computes."""
    folder.mkdir()
    return Path(shutil.copy(checkpoint, folder / "alone.ckpt"))


def test_a_missing_config_is_asked_for(checkpoint, small_vocab_file, tmp_path):
    with pytest.raises(InputError, match="config"):
        export(lonely(checkpoint, tmp_path / "c"), tmp_path / "model", small_vocab_file, logits=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_another_rope_ratio_is_refused(checkpoint, small_vocab_file, tmp_path):
    report = json.loads(checkpoint.with_suffix(".report.json").read_text())
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**report["huggingface_config"], "rope_ratio": 7}))
    with pytest.raises(InputError, match="rope_ratio"):
        export(checkpoint, tmp_path / "model", small_vocab_file, config, logits=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_rank_without_checkpoint_is_named(checkpoint, small_vocab_file, tmp_path):
    for rank in (0, 1, 2):
        (tmp_path / f"run/rank_{rank}").mkdir(parents=True)
        if rank != 1:
            shutil.copy(checkpoint, tmp_path / f"run/rank_{rank}/glm32k_rank_{rank}-1_20.ckpt")
    with pytest.raises(InputError, match="the file of rank 1 is missing"):
        export(tmp_path / "run", tmp_path / "model", small_vocab_file, merging={}, logits=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_nothing(checkpoint, small_vocab_file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_folder, "card_text", full)
    with pytest.raises(InputError, match="the disk is full"):
        export(checkpoint, tmp_path / "model", small_vocab_file, logits=False)
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_folder_of_that_name(checkpoint, small_vocab_file, tmp_path):
    program = (
        "import os, sys; from mindformers_glm32k.export import export, folder; "
        "folder.card_text = lambda *_: os.kill(os.getpid(), 9); export(*sys.argv[1:], logits=False)"
    )
    arguments = [str(path) for path in (checkpoint, tmp_path / "model", small_vocab_file)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    assert not (tmp_path / "model").exists() and (tmp_path / ".model.work" / "model" / "config.json").is_file()
    export(checkpoint, tmp_path / "model", small_vocab_file, logits=False)  # takes the place of what was left
    assert (tmp_path / "model" / "README.md").is_file()
    assert not (tmp_path / ".model.work").exists()

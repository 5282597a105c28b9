"""A Hugging Face folder in load_checkpoint: every layout and naming arrives whole, once, also with many processes."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import convert, convert_reversed
from mindformers_glm32k.weights.loading import FOLDER, checkpoint_to_load, is_huggingface

from .synthetic import TINY, chatglm_shapes, random_values, write_folder


@pytest.fixture
def folders(tmp_path):
    write_folder(tmp_path / "bin", TINY, random_values(chatglm_shapes(TINY), "fp16"), "bin")
    convert_reversed(tmp_path / "bin", tmp_path / "chatglm", max_shard_size="200KB")
    convert_reversed(tmp_path / "bin", tmp_path / "glm", hf_naming="glm")
    return tmp_path


@pytest.mark.parametrize("qkv_concat, mlp_concat", list(itertools.product((True, False), (True, False))))
def test_every_kind_of_folder_gives_the_model_s_layout(folders, qkv_concat, mlp_concat):
    layout = dict(qkv_concat=qkv_concat, mlp_concat=mlp_concat)
    for format in ("ckpt", "safetensors"):
        convert(folders / "bin", folders / f"expected.{format}", **layout)
        expected = (folders / f"expected.{format}").read_bytes()
        for kind in ("bin", "chatglm", "glm"):
            chosen = checkpoint_to_load(str(folders / kind), str(folders / kind / "output"), format, **layout)
            assert chosen == str(folders / kind / "output" / FOLDER / f"model.{format}")
            with open(chosen, "rb") as file:
                assert file.read() == expected


def test_folders_that_mindformers_will_cut(folders):
    chosen = checkpoint_to_load(str(folders / "glm"), str(folders / "out"), "safetensors", shard_later=True)
    assert chosen == str(folders / "out" / FOLDER)
    assert [path.name for path in (folders / "out" / FOLDER).glob("*.safetensors")] == ["model.safetensors"]
    chosen = checkpoint_to_load(str(folders / "glm"), str(folders / "out2"), "ckpt", shard_later=True)
    assert chosen == str(folders / "out2" / FOLDER)
    assert (folders / "out2" / FOLDER / "rank_0" / "model.ckpt").is_file()


def test_what_is_not_hugging_face_stays_as_it_is(folders):
    convert(folders / "bin", folders / "ms" / "model.safetensors", qkv_concat=False, mlp_concat=False)
    convert(folders / "bin", folders / "trained" / "rank_0" / "model.ckpt")
    (folders / "empty").mkdir()
    for path in (
        None,
        "",
        "nowhere",
        str(folders / "ms"),
        str(folders / "ms" / "model.safetensors"),
        str(folders / "trained"),
        str(folders / "empty"),
    ):
        assert checkpoint_to_load(path, str(folders / "out")) == path
    assert not (folders / "out").exists()
    assert is_huggingface(folders / "bin") and is_huggingface(folders / "glm") and is_huggingface(folders / "chatglm")


def test_many_processes_convert_once(folders, monkeypatch):
    from mindformers_glm32k.weights import conversion, loading

    runs, write = [], conversion._write
    monkeypatch.setattr(conversion, "_write", lambda *args: (runs.append(1), write(*args))[1])
    monkeypatch.setattr(loading, "_WAIT_SECONDS", 0.01)
    with ThreadPoolExecutor(8) as pool:  # the lock is on an open file: threads exclude each other as processes do
        chosen = list(pool.map(lambda _: checkpoint_to_load(str(folders / "bin"), str(folders / "out")), range(8)))
    assert len(set(chosen)) == 1 and len(runs) == 1
    checkpoint_to_load(str(folders / "bin"), str(folders / "out"))
    assert len(runs) == 1  # the next run finds it done
    checkpoint_to_load(str(folders / "bin"), str(folders / "out"), qkv_concat=False)
    assert len(runs) == 2  # another layout is another conversion


def test_a_checkpoint_whose_config_is_not_the_run_s_is_refused(folders):
    """Shapes agree; the rotary base, the epsilon and the heads do not show in them."""
    convert(folders / "bin", folders / "converted" / "model.ckpt")
    convert(folders / "bin", folders / "converted" / "sharded.safetensors", max_shard_size="200KB")
    shards = sorted((folders / "converted").glob("sharded-*"))
    run = {**TINY, "rope_ratio": 50, "layernorm_epsilon": "1e-5"}
    for path in (folders / "bin", folders / "glm", folders / "converted" / "model.ckpt", shards[0]):
        checkpoint_to_load(str(path), str(folders / "out"), model_config=run)
        for change, message in (
            ({"rope_ratio": 1}, "rope_ratio is 50, but model.model_config of this run has rope_ratio 1: another model"),
            ({"rope_ratio": None, "type": "ChatGLM2Config"}, "rope_ratio is 50, but .* has rope_ratio 1"),
            ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon is 1e-05, but .* layernorm_epsilon 1e-06"),
            (
                {"num_attention_heads": 2, "kv_channels": 32, "multi_query_group_num": 1},
                "num_attention_heads is 4, kv_channels is 16, multi_query_group_num is 2, but .* kv_channels 32",
            ),
            ({"padded_vocab_size": 1088}, "padded_vocab_size is 1024, but .* padded_vocab_size 1088"),
            ({"post_layer_norm": False}, "post_layer_norm is True, but"),
        ):
            with pytest.raises(InputError, match=message):
                checkpoint_to_load(str(path), str(folders / "none"), model_config={**run, **change})
    assert not (folders / "none").exists()


def test_one_file_of_a_hugging_face_folder(folders):
    for path in (
        folders / "bin" / "pytorch_model-00001-of-00002.bin",
        folders / "bin" / "pytorch_model.bin.index.json",
        folders / "glm" / "model.safetensors",
        next((folders / "chatglm").glob("model-00001*.safetensors")),
    ):
        with pytest.raises(
            InputError, match=f"{path.name}: (a|one) file of a Hugging Face.*give the folder, {path.parent}"
        ):
            checkpoint_to_load(str(path), str(folders / "out"))


def test_folders_of_other_kinds_are_refused_in_words(folders):
    """What MindFormers would answer with a traceback that names nothing."""
    values = random_values({"model.layers.0.self_attn.rotary.weight": (4, 4), "model.score": (4,)}, "fp16")
    prefix = random_values({"transformer.prefix_encoder.embedding.weight": (8, 192)}, "fp16")
    write_folder(folders / "other", TINY, values, "bin", shards=1)
    write_folder(folders / "ptuning", TINY, prefix, "safetensors", shards=1)
    (folders / "adapter").mkdir()
    (folders / "adapter" / "adapter_config.json").write_text("{}")
    for name, message in (
        ("other", "is not a weight of ChatGLM3"),
        ("ptuning", r"P-Tuning v2 \(prefix_encoder\)"),
        ("adapter", "a PEFT adapter, not a whole model; .*--adapter"),
    ):
        with pytest.raises(InputError, match=message):
            checkpoint_to_load(str(folders / name), str(folders / "out"))


def test_broken_folders_stop_the_run(folders):
    (folders / "bin" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="1 of 2 shards are missing"):
        checkpoint_to_load(str(folders / "bin"), str(folders / "out"))


@pytest.mark.parametrize("mode", ("train", "evaluate", "predict"))
def test_the_trainer_loads_the_converted_file(folders, monkeypatch, mode):
    from conftest import ROOT
    from mindformers import CausalLanguageModelingTrainer
    from mindformers.tools.register import MindFormerConfig

    from mindformers_glm32k.training import trainer

    seen = []
    monkeypatch.setattr(CausalLanguageModelingTrainer, mode, lambda self, config=None, **_: seen.append(config))
    monkeypatch.setattr(
        CausalLanguageModelingTrainer, "predict_process", lambda self, config=None, **_: seen.append(config) or []
    )
    for check in ("check_dataset", "check_vocabulary", "check_config"):  # of what this run has not: data, a tokenizer
        monkeypatch.setattr(trainer, check, lambda *_: None)
    monkeypatch.setattr(trainer, "ChatPromptTokenizer", lambda *_, **__: None)
    config = MindFormerConfig(str(ROOT / "research" / "glm32k" / "predict_glm32k_tiny_cpu.yaml"))
    config.load_checkpoint, config.output_dir = str(folders / "bin"), str(folders / "run")
    config.model.model_config.update(TINY, qkv_concat=False)

    class Tokenizer:
        """What predict reads of a tokenizer."""

        stop_token_ids, vocab_file = [2], "x"

    options = {"input_data": "a", "tokenizer": Tokenizer} if mode == "predict" else {}
    getattr(trainer.GLM32KTrainer(), mode)(config=config, **options)
    assert seen[0].load_checkpoint == str(folders / "run" / FOLDER / "model.ckpt")

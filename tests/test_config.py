"""GLM32KConfig: defaults, the published config.json, validation."""

import inspect
import json

import mindspore.common.dtype as mstype
import pytest
import yaml
from conftest import ROOT
from mindformers.models.glm2 import ChatGLM2Config

from mindformers_glm32k import GLM32KConfig
from mindformers_glm32k.errors import InputError

NOT_READ = {  # by the model; upstream's glm2 does not read them either
    "bias_dropout_fusion",
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "fp32_residual_connection",
    "quantization_bit",
    "prefix_projection",
    "gmask_token_id",
    "bos_token_id",
}


def test_defaults_are_those_of_the_published_model(reference):
    published = GLM32KConfig.from_huggingface(reference / "chatglm3-6b-32k_config.json")
    default = GLM32KConfig()
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "multi_query_group_num",
        "kv_channels",
        "padded_vocab_size",
        "seq_length",
        "rope_ratio",
        "layernorm_epsilon",
        "add_qkv_bias",
    ):
        assert getattr(default, name) == getattr(published, name), name
    assert (default.seq_length, default.rope_ratio) == (32768, 50)
    assert published.compute_dtype == published.param_init_type == mstype.float16


def test_flash_attention_is_the_default(reference):
    assert GLM32KConfig().use_flash_attention is True
    assert GLM32KConfig.from_huggingface(reference / "chatglm3-6b-32k_config.json").use_flash_attention is True
    assert GLM32KConfig(use_flash_attention=False).use_flash_attention is False
    with pytest.raises(InputError, match="use_flash_attention='yes': allowed is true or false"):
        GLM32KConfig(use_flash_attention="yes")


@pytest.mark.parametrize("path", sorted((ROOT / "research" / "glm32k").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_yamls_say_which_attention(path):
    section = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["model_config"]
    assert section["use_flash_attention"] is True


def test_every_field_is_documented():
    fields = {*inspect.signature(ChatGLM2Config).parameters, *inspect.signature(GLM32KConfig).parameters}
    fields -= {*NOT_READ, "kwargs", "checkpoint_name_or_path"}
    assert not [name for name in fields if name not in GLM32KConfig.__doc__]


def test_from_huggingface_takes_folder_and_overrides(reference):
    folder = reference / "tiny_hf" / "hf_safetensors_fp32"
    config = GLM32KConfig.from_huggingface(folder, seq_length=64, compute_dtype="float32")
    assert (config.num_layers, config.seq_length, config.compute_dtype) == (3, 64, mstype.float32)
    assert GLM32KConfig.from_huggingface(folder / "config.json").seq_length == 32768


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        ("{", "not a JSON file"),
        ("[]", "model_type"),
        ('{"model_type": "llama"}', "'llama'"),
        ('{"model_type": "chatglm", "num_layers": 0}', "num_layers=0"),
    ],
)
def test_from_huggingface_names_the_file_and_the_fault(tmp_path, content, words):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        GLM32KConfig.from_huggingface(path)
    assert str(path) in str(error.value) and words in str(error.value)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(InputError) as error:
        GLM32KConfig(
            num_layers=0,
            hidden_dropout=1.5,
            kv_channels=6,
            multi_query_group_num=3,
            compute_dtype="int8",
            qkv_concat="yes",
            eos_token_id=[2, 70000],
            pre_seq_len=128,
            cells="gpu",
        )
    message = str(error.value)
    for part in (
        "num_layers=0: allowed is an integer >= 1",
        "hidden_dropout=1.5: allowed is a number in [0, 1)",
        "kv_channels=6: allowed is a multiple of 4",
        "multi_query_group_num=3: allowed is a divisor of",
        "compute_dtype='int8': allowed is one of float32",
        "qkv_concat='yes': allowed is true or false",
        "eos_token_id=[2, 70000]",
        "pre_seq_len=128",
        "cells='gpu': allowed is one of auto",
    ):
        assert part in message, part


def test_booleans_are_no_integers():
    with pytest.raises(InputError, match="num_layers=True"):
        GLM32KConfig(num_layers=True)


def test_unknown_keys_suggest_the_nearest():
    with pytest.raises(InputError) as error:
        GLM32KConfig(num_layer=2, rope_ration=1)
    assert "'num_layer', did you mean 'num_layers'?" in str(error.value)
    assert "'rope_ration', did you mean 'rope_ratio'?" in str(error.value)


def test_numbers_and_null_as_yaml_files_write_them():
    config = GLM32KConfig(layernorm_epsilon="1e-5", pre_seq_len="None", rope_ratio="5e1")
    assert (config.layernorm_epsilon, config.pre_seq_len, config.rope_ratio) == (1e-5, None, 50.0)


def test_what_mindformers_adds_is_taken():
    config = GLM32KConfig(top_k=3, max_new_tokens=7, moe_config=None, dataset_config={}, disable_lazy_inline=True)
    assert (config.top_k, config.max_new_tokens) == (3, 7)


def test_saved_config_comes_back(tmp_path):
    config = GLM32KConfig(num_layers=2, hidden_size=64, num_attention_heads=4, kv_channels=16, cells="portable")
    saved = json.loads(json.dumps(config.to_dict(), default=str))
    again = GLM32KConfig(**saved)
    for name in ("num_layers", "vocab_size", "n_kv_heads", "compute_dtype", "cells", "eos_token_id"):
        assert getattr(again, name) == getattr(config, name), name
    with pytest.raises(InputError, match="vocab_size=5: contradicts padded_vocab_size=6"):
        GLM32KConfig(vocab_size=5, padded_vocab_size=6)


def test_choice_of_cells():
    assert GLM32KConfig(cells="portable").use_portable_cells is True
    assert GLM32KConfig(cells="ascend").use_portable_cells is False
    assert GLM32KConfig().use_portable_cells is True  # the tests run on CPU

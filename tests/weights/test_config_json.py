"""config.json as transformers 4 and 5 write it, and what it must not leave open: the rotary base."""

import json

import numpy as np
import pytest

from mindformers_glm32k.dryrun.simulator.state import load_weights
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import convert, convert_reversed, load_hf_weights, merge, split
from mindformers_glm32k.weights.config_json import (
    PUBLISHED,
    config_text,
    dims_from_config,
    read_config,
    to_chatglm,
    to_glm,
)

from .parallel import write_layout
from .synthetic import TINY, chatglm_shapes, random_values, write_folder

GLM = {key: value for key, value in to_glm(PUBLISHED).items() if key not in ("rope_theta", "rope_parameters")}
GLM.pop("partial_rotary_factor")
CHATGLM = {key: value for key, value in PUBLISHED.items() if key != "rope_ratio"}
ROPE = {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}


def read(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path)


@pytest.mark.parametrize(
    "config, ratio",
    (
        ({**GLM, "rope_theta": 500000.0, "partial_rotary_factor": 0.5}, 50),
        ({**GLM, "rope_parameters": ROPE}, 50),
        ({**GLM, "rope_parameters": {"rope_theta": 10000.0}, "rope_theta": 10000.0}, 1),
        ({**GLM, "rope_theta": 5000000, "rope_scaling": None}, 500),
        ({**GLM, "rope_theta": 15000.0}, 1.5),
        ({**CHATGLM, "rope_ratio": 50}, 50),
        ({**CHATGLM, "rope_ratio": 50, "rope_theta": 10000.0}, 50),  # the base, as other programs write it
        ({**CHATGLM, "rope_parameters": ROPE}, 50),
        ({**CHATGLM, "rope_theta": 500000}, 50),
        ({**CHATGLM, "seq_length": 8192}, 1),
    ),
)
def test_the_rotary_base_of_every_form(tmp_path, config, ratio):
    known = read(tmp_path, config)
    assert known.fields["rope_ratio"] == ratio and "rope_parameters" not in known.fields
    assert bool(known.notes) == (config.get("seq_length") == 8192)


@pytest.mark.parametrize(
    "config, message",
    (
        (GLM, "neither rope_theta nor rope_parameters is there; add rope_theta"),
        ({**GLM, "rope_parameters": {"partial_rotary_factor": 0.5}}, "neither rope_theta nor rope_parameters"),
        (CHATGLM, "neither rope_ratio nor rope_theta nor rope_parameters is there, and seq_length is 32768"),
        ({**GLM, "rope_parameters": ROPE, "rope_theta": 10000.0}, "rope_theta is 10000.0, but 500000.0 in rope_param"),
        ({**GLM, "rope_theta": 500000.0, "rope_ratio": 1}, "rope_theta is 500000.0, rope_ratio 1"),
        ({**CHATGLM, "rope_ratio": 1, "rope_parameters": ROPE}, "rope_ratio is 1, rope_theta 500000.0"),
        ({**GLM, "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4}}, "rope_parameters is .*yarn"),
        ({**GLM, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is .*linear"),
        ({**GLM, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}, "partial_rotary_factor 0.5"),
        ({**GLM, "rope_theta": "much"}, "rope_theta is 'much', a positive number"),
        ({**CHATGLM, "rope_ratio": 0}, "rope_ratio is 0, a positive number"),
    ),
)
def test_what_is_refused(tmp_path, config, message):
    with pytest.raises(InputError, match="config.json: " + message):
        read(tmp_path, config)


def test_chatglm2_scales_positions_otherwise(tmp_path):
    config = {**PUBLISHED, "_name_or_path": "THUDM/chatglm2-6b-32k"}
    with pytest.raises(InputError, match="'THUDM/chatglm2-6b-32k', rope_ratio 50: ChatGLM2 divides positions"):
        read(tmp_path, config)
    assert read(tmp_path, {**config, "rope_ratio": 1}).fields["rope_ratio"] == 1


@pytest.mark.parametrize(
    "text, message",
    [
        (json.dumps(PUBLISHED)[:-1] + ', "rope_ratio": 1}', "key 'rope_ratio' is given twice, as 50 and 1"),
        ("[" * 99999, "brackets nested too deeply"),
    ],
)
def test_json_that_says_two_things_or_none(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json: cannot be read as JSON .{message}"):
        read_config(tmp_path)


def test_both_versions_words_are_written(tmp_path):
    config = json.loads(config_text(PUBLISHED, "glm", "bf16"))
    assert config["rope_parameters"] == ROPE
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (500000.0, 0.5)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    for gone in (("rope_parameters", "dtype"), ("rope_theta", "partial_rotary_factor", "torch_dtype")):
        fields = read(tmp_path, {key: value for key, value in config.items() if key not in gone}).fields
        assert (fields["rope_ratio"], fields["torch_dtype"]) == (50, "bfloat16")


def test_configs_that_differ_are_refused_by_both_conversions(tmp_path):
    write_folder(tmp_path / "hf", {**TINY, "rope_ratio": 1}, random_values(chatglm_shapes(TINY), "fp16"), "bin")
    convert(tmp_path / "hf", tmp_path / "out.ckpt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", **TINY, "rope_ratio": 50}))
    with pytest.raises(InputError, match="hf/config.json: rope_ratio is 1, but .*/config.json has rope_ratio 50"):
        convert(tmp_path / "hf", tmp_path / "other.ckpt", config=tmp_path / "config.json")
    with pytest.raises(InputError, match="out.report.json: rope_ratio is 1, but .*/config.json has rope_ratio 50"):
        convert_reversed(tmp_path / "out.ckpt", tmp_path / "back", config=tmp_path / "config.json")
    assert not (tmp_path / "back").exists() and not (tmp_path / "other.ckpt").exists()


def test_split_merge_and_simulate_compare_too(tmp_path):
    """Before anything is read or written: none of these ranks, strategies or states needs to be whole."""
    write_folder(tmp_path / "hf", {**TINY, "rope_ratio": 1}, random_values(chatglm_shapes(TINY), "fp16"), "bin")
    convert(tmp_path / "hf", tmp_path / "whole.ckpt")
    strategy, run = write_layout(tmp_path / "strategy", "mp2"), {**TINY, "rope_ratio": 50}
    for path in (tmp_path / "hf", tmp_path / "whole.ckpt"):
        message = "rope_ratio is 1, but model.model_config of the run has rope_ratio 50"
        with pytest.raises(InputError, match=message):
            split(path, tmp_path / "out", strategy, model_config=run)
        with pytest.raises(InputError, match=message):
            load_weights(path, {}, {"model": {"model_config": run}}, tmp_path / "work")
        with pytest.raises(InputError, match=message):
            options = dict(lora=True, lora_scaling=1.0, base=path, model_config=run)
            merge(tmp_path / "ranks", tmp_path / "out.ckpt", strategy, **options)
    assert not (tmp_path / "out").exists()


def test_published_fields(reference):
    assert json.loads((reference / "chatglm3-6b-32k_config.json").read_text()) == PUBLISHED


def test_glm_is_the_inverse_of_chatglm():
    native = to_glm(PUBLISHED)
    assert native["rope_theta"] == 500000 and native["partial_rotary_factor"] == 0.5
    assert native["eos_token_id"] == [2, 64795, 64797]
    back = to_chatglm(native, "config.json")
    assert back == {key: value for key, value in PUBLISHED.items() if key != "_name_or_path"}
    assert dims_from_config(native, "a") == dims_from_config(PUBLISHED, "b")


def test_what_the_file_leaves_out_is_not_left_to_another_model_s_defaults():
    sizes = {
        key: PUBLISHED[key]
        for key in (
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "kv_channels",
            "ffn_hidden_size",
            "padded_vocab_size",
            "multi_query_group_num",
        )
    }
    native = to_glm(sizes)
    assert (native["pad_token_id"], native["rms_norm_eps"], native["attention_bias"]) == (0, 1e-5, True)


def test_settings_that_chatglm_has_not():
    with pytest.raises(InputError, match="partial_rotary_factor"):
        to_chatglm(dict(to_glm(PUBLISHED), partial_rotary_factor=1.0), "config.json")


@pytest.mark.parametrize(
    "text, message",
    (
        ("model:\n  arch: {}\n", "model.model_config"),
        ("model: [", "model.model_config"),
        ("model:\n  model_config:\n    num_layers: many\n", "num_layers is 'many', a number"),
    ),
)
def test_yaml_that_is_none(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match="x.yaml.*" + message):
        read_config(tmp_path / "x.yaml")


def _rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _rotate(x, theta):
    """Rotates interleaved pairs of the first half of each head; x (seq, heads, head_dim). Source: modeling_glm.py."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] / theta ** (np.arange(0, half, 2) / half)  # (seq, half / 2)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    even, odd = x[..., 0:half:2], x[..., 1:half:2]
    turned = np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(*x.shape[:2], half)
    return np.concatenate([turned, x[..., half:]], -1)


def _glm(weights, config, ids):
    """Logits (seq, vocab) of transformers' `glm` for one row of ids."""
    heads, groups, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, length = config["rms_norm_eps"], len(ids)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):

        def w(name, prefix=f"model.layers.{layer}."):
            return weights[prefix + name]

        y = _rms_norm(x, w("input_layernorm.weight"), eps)
        q, k, v = (
            (y @ w(f"self_attn.{p}_proj.weight").T + w(f"self_attn.{p}_proj.bias")).reshape(length, -1, dim)
            for p in "qkv"
        )
        q, k = _rotate(q, config["rope_theta"]), _rotate(k, config["rope_theta"])
        k, v = (np.repeat(part, heads // groups, 1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", scores, v).reshape(length, -1) @ w("self_attn.o_proj.weight").T
        y = _rms_norm(x, w("post_attention_layernorm.weight"), eps)
        gate, up = np.split(y @ w("mlp.gate_up_proj.weight").T, 2, -1)
        x = x + (up * gate / (1 + np.exp(-gate))) @ w("mlp.down_proj.weight").T
    return _rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def test_native_naming_has_the_published_logits(reference, tmp_path):
    convert_reversed(reference / "tiny_hf" / "hf_bin_fp16", tmp_path / "native", hf_naming="glm")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    weights = {name: values.astype(np.float64) for name, values in load_hf_weights(tmp_path / "native")}
    golden = np.load(reference / "tiny_hf" / "golden.npz")
    for ids, logits in zip(golden["input_ids"], golden["logits"]):
        assert np.abs(_glm(weights, config, ids) - logits).max() < 1e-4
    wrong = dict(config, rope_theta=10000.0)  # control: the comparison sees a wrong rope
    assert np.abs(_glm(weights, wrong, golden["input_ids"][0]) - golden["logits"][0]).max() > 1e-2

"""config.json in both namings, and the native naming's meaning: a plain NumPy `glm` gives the published logits."""

import json

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import convert_reversed, load_hf_weights
from mindformers_glm32k.weights.config_json import read_config, to_chatglm, to_glm
from mindformers_glm32k.weights.model_dims import PUBLISHED, dims_from_config


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

"""The table of names is its own inverse, covers the published model, and refuses what it does not know."""

import itertools
import json

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.names import NAMINGS, TensorKey, key_of, model_keys, name_of, plain_name


@pytest.mark.parametrize(
    "naming, qkv_concat, mlp_concat", list(itertools.product(NAMINGS, (True, False), (True, False)))
)
def test_reverse_is_inverse(naming, qkv_concat, mlp_concat):
    expected = model_keys(12, True, qkv_concat, mlp_concat)
    names = [name_of(key, naming) for key in expected]
    assert [key_of(name) for name in names] == expected
    assert len(set(names)) == len(names)


def test_covers_the_published_index(reference):
    index = json.loads((reference / "chatglm3-6b_pytorch_model.bin.index.json").read_text())["weight_map"]
    published = {name for name in index if key_of(name) is not None}
    assert published == {name_of(key, "chatglm") for key in model_keys(28, True, True, True)}
    assert len(published) == 199
    assert all("inv_freq" in name for name in set(index) - published)


def test_parameters_are_those_of_upstreams_model():
    assert [name_of(key, "mindspore") for key in model_keys(1, True, False, False)] == [
        "transformer.embedding.embedding_weight",
        "transformer.encoder.layers.0.input_layernorm.weight",
        "transformer.encoder.layers.0.self_attention.wq.weight",
        "transformer.encoder.layers.0.self_attention.wk.weight",
        "transformer.encoder.layers.0.self_attention.wv.weight",
        "transformer.encoder.layers.0.self_attention.wq.bias",
        "transformer.encoder.layers.0.self_attention.wk.bias",
        "transformer.encoder.layers.0.self_attention.wv.bias",
        "transformer.encoder.layers.0.self_attention.dense.weight",
        "transformer.encoder.layers.0.post_attention_layernorm.weight",
        "transformer.encoder.layers.0.mlp.dense_left.weight",
        "transformer.encoder.layers.0.mlp.dense_right.weight",
        "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight",
        "transformer.encoder.final_layernorm.weight",
        "transformer.output_layer.weight",
    ]


@pytest.mark.parametrize(
    "name",
    (
        "transformer.encoder.layers.0.self_attention.query_key_value.weights",
        "transformer.encoder.layers.00.input_layernorm.weight",
        "transformer.prefix_encoder.embedding.weight",
        "lm_head.bias",
        "xtransformer.output_layer.weight",
        "",
    ),
)
def test_unknown_name_raises(name):
    with pytest.raises(InputError, match="not a weight of ChatGLM3"):
        key_of(name)


def test_adapters_are_named_as_such():
    with pytest.raises(InputError, match="LoRA"):
        key_of("transformer.encoder.layers.0.self_attention.query_key_value.pet_delta_lora_a")


@pytest.mark.parametrize(
    "name",
    (
        "transformer.rotary_pos_emb.inv_freq",
        "global_step",
        "loss_scale",
        "adam_m.transformer.output_layer.weight",
        "epoch_num",
    ),
)
def test_buffers_and_training_state_are_skipped(name):
    assert key_of(name) is None


def test_parts_without_a_tensor():
    with pytest.raises(KeyError):
        name_of(TensorKey(("q", "v"), 0), "glm")


@pytest.mark.parametrize("name", ["a.b", "adam_m.a.b", "adam_v.a.b", "accu_grads.a.b"])
def test_the_weight_of_a_state(name):
    assert plain_name(name) == "a.b"

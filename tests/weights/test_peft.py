"""PEFT folders: merged into a base as PEFT merges them, and written so that PEFT loads them."""

import json

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import convert, convert_reversed, load_hf_weights
from mindformers_glm32k.weights.config_json import dims_from_config
from mindformers_glm32k.weights.lora import write_adapter

from .synthetic import TINY, chatglm_shapes, random_values, write_folder, write_safetensors, write_torch

LAYER = "transformer.encoder.layers.{}."
TARGETS = {
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
DIMS = dims_from_config({"model_type": "chatglm", **TINY}, "TINY")


@pytest.fixture(scope="module")
def tensors():
    return random_values(chatglm_shapes(TINY), "fp32")


@pytest.fixture
def base(tmp_path, tensors):
    write_folder(tmp_path / "hf", TINY, tensors, "bin")
    return tmp_path / "hf"


def adapters(tensors, targets=TARGETS, rank=lambda module: 4, seed=5):
    """module -> (A, B), random, none of them small."""
    modules = [LAYER.format(layer) + TARGETS[target] for layer in range(3) for target in targets]
    shapes = {module: tensors[module + ".weight"].shape for module in modules}
    rng = np.random.default_rng(seed)
    return {
        module: (
            rng.standard_normal((rank(module), columns), np.float32),
            rng.standard_normal((rows, rank(module)), np.float32),
        )
        for module, (rows, columns) in shapes.items()
    }


def write_peft(folder, pairs, kind="safetensors", more=None, infix="", **config):
    folder.mkdir()
    targets = sorted({module.rsplit(".", 1)[1] for module in pairs})
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    values = {}
    for module, pair in pairs.items():
        for side, value in zip("AB", pair):
            values[f"base_model.model.{module}.lora_{side}{infix}.weight"] = value
    values.update(more or {})
    write = write_torch if kind == "bin" else write_safetensors
    write(folder / f"adapter_model.{kind}", values)
    return folder


def merged(tensors, pairs, scale):
    """W + scale B A in double precision."""
    result = {name: values.astype(np.float64) for name, values in tensors.items() if "rotary" not in name}
    for module, (a, b) in pairs.items():
        scaled = scale(module) if callable(scale) else scale
        result[module + ".weight"] += scaled * b.astype(np.float64) @ a.astype(np.float64)
    return result


def read_back(checkpoint, folder):
    """The published names and layout of what was converted."""
    convert_reversed(checkpoint, folder)
    return dict(load_hf_weights(folder))


def assert_equal(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("concat", (True, False))
@pytest.mark.parametrize("kind, infix", (("safetensors", ""), ("bin", ".default")))
def test_an_adapter_is_merged(base, tensors, tmp_path, kind, infix, concat):
    pairs = adapters(tensors)
    folder = write_peft(tmp_path / "adapter", pairs, kind, infix=infix)
    report = convert(base, tmp_path / "o.ckpt", adapter=folder, qkv_concat=concat, mlp_concat=concat)
    assert "12 LoRA adapters of rank 4 merged" in report["remarks"][-1]
    assert_equal(read_back(tmp_path / "o.ckpt", tmp_path / "back"), merged(tensors, pairs, 2.0))
    convert(base, tmp_path / "plain.ckpt")  # control: the comparison sees that nothing was merged
    with pytest.raises(AssertionError):
        assert_equal(read_back(tmp_path / "plain.ckpt", tmp_path / "control"), merged(tensors, pairs, 2.0))


def test_ranks_and_scales_by_pattern(base, tensors, tmp_path):
    ranks = {"layers.1.self_attention.dense": 2, "dense_4h_to_h": 8}

    def rank(module):
        return next((r for key, r in ranks.items() if module.endswith("." + key)), 4)

    pairs = adapters(tensors, rank=rank)
    for number, (stable, root) in enumerate(((False, 1.0), (True, 0.5))):
        options = {"rank_pattern": ranks, "alpha_pattern": {"query_key_value": 20}, "use_rslora": stable}
        folder = write_peft(tmp_path / f"adapter{number}", pairs, lora_dropout=0.1, **options)
        convert(base, tmp_path / f"{number}.ckpt", adapter=folder)
        expected = merged(tensors, pairs, lambda m, root=root: (20 if "query" in m else 8) / rank(m) ** root)
        assert_equal(read_back(tmp_path / f"{number}.ckpt", tmp_path / f"back{number}"), expected)


def test_namings_may_differ_between_base_and_adapter(base, tensors, tmp_path):
    """An adapter of the fused projection on a base with split ones, as transformers' `glm` has them."""
    convert_reversed(base, tmp_path / "glm", hf_naming="glm")
    pairs = adapters(tensors)
    convert(tmp_path / "glm", tmp_path / "o.ckpt", adapter=write_peft(tmp_path / "adapter", pairs))
    assert_equal(read_back(tmp_path / "o.ckpt", tmp_path / "back"), merged(tensors, pairs, 2.0))


@pytest.mark.parametrize("infix", ("", ".modules_to_save", ".modules_to_save.default"))
def test_modules_to_save_replace_the_base_s(base, tensors, tmp_path, infix):
    pairs, output = adapters(tensors, ["dense"]), tensors["transformer.output_layer.weight"] + 1
    more = {f"base_model.model.transformer.output_layer{infix}.weight": output}
    folder = write_peft(tmp_path / "adapter", pairs, more=more, modules_to_save=["output_layer"])
    convert(base, tmp_path / "o.ckpt", adapter=folder)
    expected = {**merged(tensors, pairs, 2.0), "transformer.output_layer.weight": output}
    assert_equal(read_back(tmp_path / "o.ckpt", tmp_path / "back"), expected)


@pytest.mark.parametrize(
    "config, message",
    (
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"use_dora": True}, "use_dora is True, which is not understood"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"r": 0}, "r is 0, a positive number"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": 8}, r"lora_A \(4, 64\) and lora_B .* are expected"),
        ({"target_modules": ["dense", "query_key_value"]}, "names 'query_key_value', but the adapter's file has none"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, a positive number"),
        ({"alpha_pattern": {"lay(ers": 3}}, "alpha_pattern: 'lay.ers' is no regular expression"),
        ({"alpha_pattern": {"dense": "8"}}, "alpha_pattern: 'dense' is '8', a positive number"),
        ({"rank_pattern": ["dense"]}, "rank_pattern is .*an object is needed"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save names 'output_layer', but"),
    ),
)
def test_adapters_that_are_not_understood(base, tensors, tmp_path, config, message):
    folder = write_peft(tmp_path / "adapter", adapters(tensors, ["dense"]), **config)
    with pytest.raises(InputError, match=f"{folder}.*{message}"):
        convert(base, tmp_path / "o.ckpt", adapter=folder)
    assert not list(tmp_path.glob("o.*"))


def test_files_that_are_not_understood(base, tensors, tmp_path):
    pairs = adapters(tensors, ["dense"])
    module, (a, b) = next(iter(pairs.items()))
    for number, (more, message) in enumerate(
        (
            ({f"base_model.model.{module}.lora_magnitude_vector": a[0]}, "lora_magnitude_vector' is not understood"),
            ({"base_model.model.model.layers.0.attn.lora_A.weight": a}, "has no lora_A and lora_B"),
            ({f"base_model.model.model.x.lora_{side}.weight": a for side in "AB"}, "is no weight of ChatGLM3"),
            (
                {
                    f"base_model.model.{module.replace('.0.', '.7.')}.lora_{side}.weight": m
                    for side, m in zip("AB", (a, b))
                },
                "layers.7.self_attention.dense' is not in the base, which has 3 layers",
            ),
            ({f"base_model.model.{module}.lora_A.weight": np.full_like(a, np.nan)}, "lora_A.weight' holds NaN"),
            ({f"base_model.model.{module}.lora_A.weight": a.astype(np.int8)}, "has dtype I8; only fp32"),
        )
    ):
        folder = write_peft(tmp_path / f"adapter{number}", pairs, more=more)
        with pytest.raises(InputError, match=message):
            convert(base, tmp_path / "o.ckpt", adapter=folder)
    with pytest.raises(InputError, match="adapter_config.json: cannot be read"):
        convert(base, tmp_path / "o.ckpt", adapter=tmp_path)


def test_layers_without_an_adapter_are_named_unless_the_config_leaves_them_out(base, tensors, tmp_path):
    pairs = adapters(tensors, ["dense"])
    del pairs[LAYER.format(1) + TARGETS["dense"]]
    folder = write_peft(tmp_path / "cut", pairs)
    with pytest.raises(InputError, match="names 'dense', but the adapter's file has none of it for the layers 1 of"):
        convert(base, tmp_path / "o.ckpt", adapter=folder)
    for number, config in enumerate(({"layers_to_transform": [0, 2]}, {"target_modules": sorted(pairs)})):
        folder = write_peft(tmp_path / f"chosen{number}", pairs, **config)
        convert(base, tmp_path / f"o{number}.ckpt", adapter=folder)
        assert_equal(read_back(tmp_path / f"o{number}.ckpt", tmp_path / f"back{number}"), merged(tensors, pairs, 2.0))


@pytest.mark.parametrize("naming", ("chatglm", "glm"))
@pytest.mark.parametrize("fused", (True, False))
def test_what_is_written_merges_to_the_same(base, tensors, tmp_path, fused, naming):
    """MindFormers' adapters, of fused or of split projections, some without one: the product is kept."""
    rng, ours, expected = np.random.default_rng(3), {}, merged(tensors, {}, 0)
    places = {"self_attention.dense": ("self_attention.dense", slice(None))}
    if fused:
        places["self_attention.query_key_value"] = ("self_attention.query_key_value", slice(None))
    else:
        places["self_attention.wq"] = ("self_attention.query_key_value", slice(0, 64))
        places["self_attention.wv"] = ("self_attention.query_key_value", slice(96, 128))
        places["mlp.dense_right"] = ("mlp.dense_h_to_4h", slice(160, 320))
    for layer in range(3):
        for name, (target, rows) in places.items():
            weight = expected[LAYER.format(layer) + target + ".weight"]
            a = rng.standard_normal((4, weight.shape[1]), np.float32)
            b = rng.standard_normal((len(weight[rows]), 4), np.float32)
            ours[LAYER.format(layer) + name + ".mindpet_delta_lora_a"] = a, "fp32"
            ours[LAYER.format(layer) + name + ".mindpet_delta_lora_b"] = b, "fp32"
            weight[rows] += 1.5 * b.astype(np.float64) @ a.astype(np.float64)
    write_adapter(tmp_path / "peft", ours, 1.5, DIMS, naming)
    convert(base, tmp_path / "o.ckpt", adapter=tmp_path / "peft")
    assert_equal(read_back(tmp_path / "o.ckpt", tmp_path / "back"), expected)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    if naming == "glm":
        targets = {"q_proj", "k_proj", "v_proj", "o_proj"} if fused else {"q_proj", "v_proj", "gate_up_proj", "o_proj"}
        assert set(config["target_modules"]) == targets and not config["rank_pattern"]
        return
    if not fused:
        with pytest.raises(InputError, match="wq.weight, .*only: their rows in the fused weight are unknown"):
            write_adapter(tmp_path / "other", ours, 1.5, None)

"""What `glm32k check` finds in checkpoints, by the lists of what their files hold."""

import numpy as np
import pytest
from weights.synthetic import TINY, chatglm_shapes, random_values, write_folder

from mindformers_glm32k.preflight.checkpoint import checkpoint_findings
from mindformers_glm32k.weights import convert
from mindformers_glm32k.weights.config_json import dims_of_run

CONFIG = {"model": {"model_config": {**TINY, "param_init_type": "float32"}}}


@pytest.fixture
def tensors():
    return random_values(chatglm_shapes(TINY), "fp32")


@pytest.fixture
def folder(tmp_path, tensors):
    """A Hugging Face folder."""
    path = tmp_path / "published"
    write_folder(path, TINY, tensors, "safetensors")
    return path


def found(path, **changes):
    config = {"model": {"model_config": {**CONFIG["model"]["model_config"], **changes}}}
    findings = checkpoint_findings(str(path), config, dims_of_run(config, "run.yaml"))
    return [(finding.severity, finding.message + finding.fix) for finding in findings]


def errors(path, **changes):
    return [text for severity, text in found(path, **changes) if severity == "error"]


def converted(folder, tmp_path, name="model.ckpt", **layout):
    convert(folder, tmp_path / name, **layout)
    return tmp_path / name


def test_checkpoints_of_the_model_pass(folder, tmp_path):
    assert found(folder) == []
    assert found(converted(folder, tmp_path)) == []
    assert (
        found(
            converted(folder, tmp_path, "split.safetensors", qkv_concat=False, mlp_concat=False),
            **{"qkv_concat": False, "mlp_concat": False},
        )
        == []
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_layers": 4}, "missing: transformer.encoder.layers.3."),
        ({"num_layers": 2}, "not in the model"),
        ({"hidden_size": 128}, "of another shape"),
        ({"qkv_concat": False}, "missing: transformer.encoder.layers.0.self_attention.wq.weight"),
        ({"padded_vocab_size": 2048}, "(1024, 64) in the file, (2048, 64) in the model"),
    ],
)
def test_other_sizes(changes, words, folder, tmp_path):
    (error,) = errors(converted(folder, tmp_path), **changes)
    assert words in error and "Check model_config" in error
    if "qkv_concat" not in changes:  # a Hugging Face folder is converted to the layout
        assert errors(folder, **changes)


def test_a_file_of_a_hugging_face_folder(folder):
    (error,) = errors(sorted(folder.glob("*.safetensors"))[0])
    assert "Hugging Face's names" in error and "give the folder" in error


@pytest.mark.parametrize("key, value", [("rope_ratio", 1), ("layernorm_epsilon", 1e-6)])
def test_what_shapes_do_not_show(key, value, tensors, tmp_path):
    """ChatGLM3-6B and 6B-32K have the same shapes; config.json, or the report of its conversion, tells them apart."""
    write_folder(tmp_path / "other", {**TINY, "rope_ratio": 50, key: value}, tensors, "safetensors")
    for path in (tmp_path / "other", converted(tmp_path / "other", tmp_path)):
        (error,) = errors(path)
        assert f"says {value}" in error and f"set {key}: {value}" in error


def test_heads_of_another_width_have_the_same_shapes(tensors, tmp_path):
    """What the loader refuses is found before a run."""
    other = {"num_attention_heads": 8, "kv_channels": 8, "multi_query_group_num": 4}
    write_folder(tmp_path / "other", {**TINY, "rope_ratio": 50, **other}, tensors, "safetensors")
    found = errors(converted(tmp_path / "other", tmp_path))
    assert len(found) == 3 and all(
        any(f"set {key}: {value}" in error for error in found) for key, value in other.items()
    )


def test_weights_alone_cannot_be_resumed(folder, tmp_path):
    path = converted(folder, tmp_path)
    config = {**CONFIG, "resume_training": True}
    (finding,) = checkpoint_findings(str(path), config, dims_of_run(config, "run.yaml"))
    assert finding.key == "resume_training" and "has no optimizer states" in finding.message


def test_nan(tensors, tmp_path):
    tensors["transformer.encoder.layers.1.input_layernorm.weight"][3] = np.nan
    write_folder(tmp_path / "nan", TINY, tensors, "safetensors")
    (error,) = errors(tmp_path / "nan")
    assert "NaN or infinity in 1 tensors" in error and "layers.1.input_layernorm.weight" in error


def test_another_dtype_is_noted(tmp_path):
    write_folder(tmp_path / "half", TINY, random_values(chatglm_shapes(TINY), "fp16"), "safetensors")
    assert found(tmp_path / "half") == [
        ("note", "holds float16, the model's parameters are float32MindSpore casts when it loads")
    ]


def test_a_broken_file(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (error,) = errors(tmp_path / "cut.safetensors")
    assert "cut.safetensors" in error
    (error,) = errors(tmp_path / "none.ckpt")
    assert "no such file or folder" in error


def test_rank_folders(folder, tmp_path):
    checkpoint = converted(folder, tmp_path)
    for step in (5, 10):
        for rank in range(2):
            target = tmp_path / "checkpoint" / f"rank_{rank}" / f"glm32k_rank_{rank}-1_{step}.ckpt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(checkpoint.read_bytes())
    assert found(tmp_path / "checkpoint") == [("note", "glm32k_rank_*-1_10.ckpt of 2 ranks is the newest complete one")]
    target.unlink()
    findings = found(tmp_path / "checkpoint")
    assert ("note", "glm32k_rank_*-1_5.ckpt of 2 ranks is the newest complete one") in findings
    assert any(severity == "warning" and "rank 1 is missing" in text for severity, text in findings)
    for path in (tmp_path / "checkpoint" / "rank_1").iterdir():
        path.unlink()
    (tmp_path / "checkpoint" / "rank_1").rmdir()
    assert errors(tmp_path / "checkpoint") == []
    assert errors(tmp_path / "checkpoint", num_layers=4)

"""Conversion both ways: equal values from both kinds of files, the original bits back for every dtype and layout."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import convert, convert_reversed, load_hf_weights, names
from mindformers_glm32k.weights.checkpoint import open_source, read_index

from .synthetic import TINY, chatglm_shapes, random_values, write_folder, write_safetensors


def read_all(path):
    """name -> (dtype, bytes) of every tensor of a checkpoint, buffers left out."""
    return {
        tensor.name: (tensor.dtype, tensor.shape, tensor.load().tobytes())
        for tensor in open_source(path).tensors.values()
        if "inv_freq" not in tensor.name
    }


@pytest.fixture(scope="module")
def tiny(reference):
    return reference / "tiny_hf"


def test_both_formats_convert_to_identical_files(tiny, tmp_path):
    for dtype in ("fp32", "fp16", "bf16"):
        for kind in ("hf_bin_fp16", "hf_safetensors_fp32"):
            convert(tiny / kind, tmp_path / f"{kind}.ckpt", dtype=dtype)
        assert (tmp_path / "hf_bin_fp16.ckpt").read_bytes() == (tmp_path / "hf_safetensors_fp32.ckpt").read_bytes()


@pytest.mark.parametrize("format", ("ckpt", "safetensors"))
def test_mindspore_loads_the_values(tiny, tmp_path, format):
    import mindspore

    path = tmp_path / f"out.{format}"
    convert(tiny / "hf_bin_fp16", path, dtype="fp32")
    loaded = mindspore.load_checkpoint(str(path), format=format)
    expected = {
        name.replace("word_embeddings.weight", "embedding_weight"): values
        for name, values in load_hf_weights(tiny / "hf_safetensors_fp32")
    }
    assert set(loaded) == set(expected)
    for name, values in expected.items():
        assert np.array_equal(loaded[name].asnumpy(), values), name


def test_split_layout_cuts_at_the_published_rows(tiny, tmp_path):
    convert(tiny / "hf_bin_fp16", tmp_path / "split.ckpt", qkv_concat=False, mlp_concat=False)
    split = {name: tensor.load() for name, tensor in open_source(tmp_path / "split.ckpt").tensors.items()}
    fused = dict(load_hf_weights(tiny / "hf_bin_fp16"))
    prefix = "transformer.encoder.layers.2."
    for kind in ("weight", "bias"):
        qkv = fused[f"{prefix}self_attention.query_key_value.{kind}"]
        for part, rows in (("wq", qkv[:64]), ("wk", qkv[64:96]), ("wv", qkv[96:])):
            assert np.array_equal(split[f"{prefix}self_attention.{part}.{kind}"], rows)
    mlp = fused[prefix + "mlp.dense_h_to_4h.weight"]
    assert np.array_equal(split[prefix + "mlp.dense_left.weight"], mlp[:160])
    assert np.array_equal(split[prefix + "mlp.dense_right.weight"], mlp[160:])


ROUND_TRIPS = list(itertools.product(("fp32", "fp16", "bf16"), ("chatglm", "glm"), (True, False), (True, False)))


@pytest.mark.parametrize("dtype, naming, qkv_concat, mlp_concat", ROUND_TRIPS)
def test_reversed_gives_the_original_bits(tmp_path, dtype, naming, qkv_concat, mlp_concat):
    values = random_values(chatglm_shapes(TINY), dtype)
    write_folder(tmp_path / "hf", TINY, values, "safetensors")
    original = read_all(tmp_path / "hf")
    if naming == "glm":  # the way there starts from the native naming as well
        convert_reversed(tmp_path / "hf", tmp_path / "native", hf_naming="glm")
        original = read_all(tmp_path / "native")
    format = "ckpt" if mlp_concat else "safetensors"
    convert(
        tmp_path / ("hf" if naming == "chatglm" else "native"),
        tmp_path / f"ms.{format}",
        format=format,
        qkv_concat=qkv_concat,
        mlp_concat=mlp_concat,
        max_shard_size="100KB" if qkv_concat else None,
    )
    stored = tmp_path / (f"ms.{format}.index.json" if qkv_concat else f"ms.{format}")
    convert_reversed(stored, tmp_path / "back", hf_naming=naming, max_shard_size="200KB")
    back = read_all(tmp_path / "back")
    assert back == original
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == naming


@pytest.mark.parametrize("dtype", ("fp16", "bf16"))
def test_the_way_through_fp32_is_exact(tmp_path, dtype):
    write_folder(tmp_path / "hf", TINY, random_values(chatglm_shapes(TINY), dtype), "bin")
    convert(tmp_path / "hf", tmp_path / "wide.ckpt", dtype="fp32", qkv_concat=False)
    convert_reversed(tmp_path / "wide.ckpt", tmp_path / "back", dtype=dtype)
    assert read_all(tmp_path / "back") == read_all(tmp_path / "hf")


def test_control_a_wrong_name_is_noticed(tmp_path, monkeypatch):
    """The comparison above can fail: with Q and K exchanged on the way there, the bits that come back differ."""
    config = dict(TINY, multi_query_group_num=4)  # Q and K have equal shapes, so nothing but the values can tell
    write_folder(tmp_path / "hf", config, random_values(chatglm_shapes(config), "fp16"), "bin")
    with monkeypatch.context() as patch:
        q, k = names._BY_PARTS[("q",)], names._BY_PARTS[("k",)]
        patch.setitem(names._BY_PARTS, ("q",), k)
        patch.setitem(names._BY_PARTS, ("k",), q)
        convert(tmp_path / "hf", tmp_path / "wrong.ckpt", qkv_concat=False)
    convert_reversed(tmp_path / "wrong.ckpt", tmp_path / "back")
    original, back = read_all(tmp_path / "hf"), read_all(tmp_path / "back")
    assert set(original) == set(back)
    assert {name.rsplit(".", 2)[1] for name in original if original[name] != back[name]} == {"query_key_value"}


def test_report_and_index(tiny, tmp_path):
    import hashlib
    import zlib

    report = convert(tiny / "hf_bin_fp16", tmp_path / "out.ckpt", dtype="fp32", max_shard_size="300KB")
    assert json.loads((tmp_path / "out.report.json").read_text()) == report
    index = json.loads((tmp_path / "out.ckpt.index.json").read_text())
    assert index["metadata"]["total_size"] == report["tensor_bytes"] == 1043712
    assert report["skipped"] == ["transformer.rotary_pos_emb.inv_freq"]
    assert sorted(set(index["weight_map"].values())) == sorted(report["output"]["files"])
    for name, tensor in open_source(tmp_path / "out.ckpt.index.json").tensors.items():
        entry = report["tensors"][name]
        data = tensor.load().tobytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["crc32"] == f"{zlib.crc32(data):08x}"
        assert (entry["file"], entry["shape"], entry["dtype"]) == (tensor.file.name, list(tensor.shape), "fp32")
        assert index["weight_map"][name] == tensor.file.name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*report["output"]["files"], "out.ckpt.index.json", "out.report.json"]
    )


def test_mindspore_finds_parameters_in_sharded_safetensors(tiny, tmp_path):
    """load_distributed_checkpoint reads a folder of safetensors by param_name_map.json; uncut, without a strategy."""
    import mindspore

    convert(tiny / "hf_bin_fp16", tmp_path / "cut" / "out.safetensors", max_shard_size="300KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 2
    mindspore.load_distributed_checkpoint(
        network=None,
        predict_strategy=None,
        format="safetensors",
        unified_safetensors_dir=str(tmp_path / "cut"),
        dst_safetensors_dir=str(tmp_path / "loaded"),
        rank_id=0,
    )
    written = read_all(next((tmp_path / "loaded").rglob("*.safetensors")))
    assert written == read_all(tmp_path / "cut" / "out.safetensors.index.json")


def test_the_safetensors_library_reads_what_is_written(tiny, tmp_path):
    from safetensors import safe_open

    convert_reversed(tiny / "hf_bin_fp16", tmp_path / "hf", dtype="fp32")
    expected = dict(load_hf_weights(tiny / "hf_safetensors_fp32"))
    with safe_open(tmp_path / "hf" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(expected)
        for name in expected:
            assert np.array_equal(file.get_tensor(name), expected[name])


def test_without_config_json_the_sizes_are_inferred(tmp_path):
    values = random_values(chatglm_shapes(TINY), "fp16")
    values.pop("transformer.rotary_pos_emb.inv_freq")
    write_safetensors(tmp_path / "model.safetensors", values)
    report = convert(tmp_path / "model.safetensors", tmp_path / "out.ckpt", qkv_concat=False)
    assert report["sizes"] == {
        "num_layers": 3,
        "vocab": 1024,
        "hidden": 64,
        "ffn": 160,
        "q_rows": 64,
        "kv_rows": 32,
        "qkv_bias": True,
    }
    assert report["huggingface_config"] is None
    with pytest.raises(InputError, match="number of heads.*--config"):
        convert_reversed(tmp_path / "out.ckpt", tmp_path / "hf")


def test_yaml_decides_layout_and_sizes(tiny, tmp_path):
    yaml = tmp_path / "model.yaml"
    fields = "".join(f"    {key}: {value}\n" for key, value in TINY.items())
    yaml.write_text(
        "model:\n  model_config:\n    type: GLM32KConfig\n    layernorm_epsilon: 1e-5\n"
        f"    qkv_concat: False\n    mlp_concat: True\n{fields}"
    )
    convert(tiny / "hf_bin_fp16", tmp_path / "out.ckpt", config=yaml)
    names = set(read_index(tmp_path / "out.ckpt"))
    assert "transformer.encoder.layers.0.self_attention.wq.weight" in names
    assert "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight" in names
    (tmp_path / "out.report.json").unlink()
    convert_reversed(tmp_path / "out.ckpt", tmp_path / "hf", config=yaml)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["rope_ratio"], written["layernorm_epsilon"], written["kv_channels"]) == (50, 1e-5, 16)
    assert written["torch_dtype"] == "float16"


def test_training_checkpoint_is_stripped(tiny, tmp_path):
    import mindspore

    convert(tiny / "hf_bin_fp16", tmp_path / "model.ckpt", dtype="fp32")
    weights = mindspore.load_checkpoint(str(tmp_path / "model.ckpt"))
    state = [{"name": name, "data": value} for name, value in weights.items()]
    state += [{"name": "adam_m." + name, "data": value} for name, value in weights.items()]
    state.append({"name": "global_step", "data": mindspore.Tensor([3], mindspore.int32)})
    mindspore.save_checkpoint(state, str(tmp_path / "trained.ckpt"), append_dict={"epoch_num": 1, "loss_scale": 65536})
    report = convert_reversed(tmp_path / "trained.ckpt", tmp_path / "hf", hf_files=tiny / "hf_bin_fp16", dtype="fp16")
    assert len(report["skipped"]) == 27
    assert read_all(tmp_path / "hf") == read_all(tiny / "hf_bin_fp16")


def test_companions_are_copied(tiny, tmp_path):
    original = tmp_path / "original"
    write_folder(original, TINY, random_values(chatglm_shapes(TINY), "fp16"), "bin")
    for name in ("tokenizer.model", "tokenizer_config.json", "modeling_chatglm.py", "MODEL_LICENSE"):
        (original / name).write_text(name)
    convert(original, tmp_path / "out.ckpt")
    convert_reversed(tmp_path / "out.ckpt", tmp_path / "back", hf_files=original)
    assert {
        "tokenizer.model",
        "tokenizer_config.json",
        "modeling_chatglm.py",
        "MODEL_LICENSE",
        "config.json",
        "model.safetensors",
    } == {path.name for path in (tmp_path / "back").iterdir()}
    convert_reversed(tmp_path / "out.ckpt", tmp_path / "native", hf_files=original, hf_naming="glm")
    assert not (tmp_path / "native" / "modeling_chatglm.py").exists()


def test_command_line(tiny, tmp_path, capsys):
    arguments = [
        "--model",
        "glm-n",
        "--input_path",
        str(tiny / "hf_bin_fp16"),
        "--output_path",
        "out.ckpt",
        "--dtype",
        "fp32",
        "--qkv_concat",
        "False",
    ]
    assert cli.main(["convert", *arguments]) == 0
    assert "36 tensors, 1,043,712 bytes, verified: out.ckpt" in capsys.readouterr().out
    back = ["--reversed", "--input_path", "out.ckpt", "--output_path", "hf", "--dtype", "fp16"]
    assert cli.main(["convert", *back]) == 0
    assert read_all(tmp_path / "hf") == read_all(tiny / "hf_bin_fp16")
    assert cli.main(["convert", "--input_path", "nowhere", "--output_path", "x.ckpt"]) == 2
    assert capsys.readouterr().err.strip().endswith("error: nowhere: no such file or folder")


def test_module_and_upstream_style_script_run(tiny, tmp_path):
    from conftest import ROOT

    script = str(ROOT / "research" / "glm32k" / "convert_weight.py")
    for number, program in enumerate((["-m", "mindformers_glm32k.weights.convert"], [script])):
        result = subprocess.run(
            [
                sys.executable,
                *program,
                "--model",
                "glm-n",
                "--input_path",
                str(tiny / "hf_safetensors_fp32"),
                "--output_path",
                f"out{number}.ckpt",
                "--dtype",
                "fp16",
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "out0.ckpt").read_bytes() == (tmp_path / "out1.ckpt").read_bytes()


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(dtype="int8"), "dtype 'int8'"),
        (dict(format="onnx"), "format 'onnx'"),
        (dict(format="safetensors"), "out.ckpt: the suffix contradicts format safetensors"),
        (dict(max_shard_size="much"), "max_shard_size 'much'"),
        (dict(max_shard_size="0GB"), "max_shard_size '0GB'"),
        (dict(workers=0), "workers 0"),
        (dict(config="missing.yaml"), "missing.yaml"),
    ),
)
def test_wrong_options_write_nothing(tiny, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        convert(tiny / "hf_bin_fp16", tmp_path / "out.ckpt", **options)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_would_do_harm(tiny, tmp_path):
    write_folder(tmp_path / "hf", TINY, random_values(chatglm_shapes(TINY), "fp16"), "safetensors", shards=1)
    with pytest.raises(InputError, match="one of the files to convert"):
        convert(tmp_path / "hf", tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        (tmp_path / "folder.ckpt").mkdir()
        convert(tmp_path / "hf", tmp_path / "folder.ckpt")
    write_folder(tmp_path / "other", TINY, random_values(chatglm_shapes(TINY), "fp16"), "bin")
    with pytest.raises(InputError, match="already holds other weights"):
        convert_reversed(tmp_path / "hf", tmp_path / "other")
    convert(tmp_path / "hf", tmp_path / "many.ckpt", max_shard_size="100KB")
    convert(tmp_path / "hf", tmp_path / "many.ckpt", max_shard_size="100KB")
    with pytest.raises(InputError, match="holds shards of an earlier conversion"):
        convert(tmp_path / "hf", tmp_path / "many.ckpt")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        convert_reversed(tmp_path / "hf", tmp_path / "file")


def test_values_that_the_dtype_cannot_hold(tmp_path):
    values = random_values(chatglm_shapes(TINY), "fp32")
    values["transformer.output_layer.weight"][5, 7] = 1e6
    write_folder(tmp_path / "hf", TINY, values, "safetensors")
    with pytest.raises(InputError, match="output_layer.weight.*1 values are too large for fp16; choose bf16 or fp32"):
        convert(tmp_path / "hf", tmp_path / "out.ckpt", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert(tmp_path / "hf", tmp_path / "out.ckpt", dtype="bf16")


def test_no_space_is_found_before_the_start(tiny, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
    with pytest.raises(InputError, match="bytes are needed, 1,048,576 are free"):
        convert(tiny / "hf_bin_fp16", tmp_path / "out.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_middle(tiny, tmp_path, monkeypatch):
    import errno
    import os

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mindformers_glm32k.weights.writer._write_exactly", full)
    with pytest.raises(InputError, match="the disk is full"):
        convert(tiny / "hf_bin_fp16", tmp_path / "out.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_went_wrong_is_noticed(tiny, tmp_path, monkeypatch):
    """Verification reads back what is on disk: a flipped byte must not be published."""
    from mindformers_glm32k.weights import writer

    write = writer._write_exactly

    def faulty(handle, view, offset):
        write(handle, view, offset)
        if len(view) > 100_000:
            write(handle, memoryview(bytes([view[5] ^ 1])), offset + 5)

    monkeypatch.setattr(writer, "_write_exactly", faulty)
    with pytest.raises(InputError, match="reads back differently"):
        convert(tiny / "hf_safetensors_fp32", tmp_path / "out.ckpt")
    assert list(tmp_path.iterdir()) == []

"""What lies in people's folders: hub caches, stale indices, unfinished downloads, wrapped and repeated names."""

import json
import os
import shutil

import numpy as np
import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import convert

from .synthetic import TINY, chatglm_shapes, random_values, write_folder, write_safetensors

EMBEDDING = "transformer.embedding.word_embeddings.weight"
OUTPUT = "transformer.output_layer.weight"
DENSE = "transformer.encoder.layers.1.self_attention.dense.weight"
QKV = "transformer.encoder.layers.0.self_attention.query_key_value."


@pytest.fixture(scope="module")
def tensors():
    return random_values(chatglm_shapes(TINY), "fp16")


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tensors):
    """The bytes of the checkpoint that every good folder must give."""
    folder = tmp_path_factory.mktemp("expected")
    write_folder(folder / "hf", TINY, tensors, "bin")
    convert(folder / "hf", folder / "out.ckpt")
    return (folder / "out.ckpt").read_bytes()


def converted(folder, output):
    """(bytes, remarks) of a conversion."""
    report = convert(folder, output / "out.ckpt")
    return (output / "out.ckpt").read_bytes(), "\n".join(report["remarks"])


def write_index(folder, name, tensors, shard):
    (folder / name).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))


@pytest.mark.parametrize("kind, shards", (("bin", 2), ("bin", 1), ("safetensors", 2), ("safetensors", 1)))
@pytest.mark.parametrize("index", ("model.safetensors.index.json", "pytorch_model.bin.index.json"))
def test_an_index_of_other_files_beside_a_complete_set(tmp_path, tensors, expected, kind, shards, index):
    """A folder where one format was removed, or resharded by another tool."""
    write_folder(tmp_path / "hf", TINY, tensors, kind, shards)
    write_index(tmp_path / "hf", index, tensors, "elsewhere-00001-of-00007" + index.split(".")[1].join("..")[:-1])
    found, remarks = converted(tmp_path / "hf", tmp_path)
    assert found == expected
    own = index.startswith("model") == (kind == "safetensors")
    if own or kind == "bin":  # an index of a kind that comes later is never looked at
        assert shards == 1 or f"{index}: 1 of 1 shards are missing" in remarks and "the complete set" in remarks


def test_a_partial_set_is_no_stand_in(tmp_path, tensors):
    """The complete one of another kind is taken; a checkpoint of another program, or a part, never is."""
    write_folder(tmp_path / "hf", TINY, tensors, "safetensors")
    (tmp_path / "hf" / "model-00002-of-00002.safetensors").unlink()
    shutil.copy(tmp_path / "hf" / "model-00001-of-00002.safetensors", tmp_path / "hf" / "extra.safetensors")
    (tmp_path / "hf" / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    (tmp_path / "hf" / "trained.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match="1 of 2 shards are missing from its folder: model-00002-of-00002"):
        converted(tmp_path / "hf", tmp_path)


@pytest.mark.parametrize("suffix", (".aria2", ".part", ".incomplete", ".crdownload"))
@pytest.mark.parametrize("kind", ("bin", "safetensors"))
def test_an_unfinished_download(tmp_path, tensors, kind, suffix):
    write_folder(tmp_path / "hf", TINY, tensors, kind)
    shard = sorted((tmp_path / "hf").glob("*-00002-of-00002*"))[0]
    (tmp_path / "hf" / ("README.md" + suffix)).write_bytes(b"")  # not of the weights
    converted(tmp_path / "hf", tmp_path)
    shard.with_name(shard.name + suffix).write_bytes(b"")
    with pytest.raises(InputError, match=f"{shard.name}: {shard.name}{suffix} lies beside it: the download is not"):
        converted(tmp_path / "hf", tmp_path)


def test_zeros_where_a_weight_should_be(tmp_path, tensors, expected):
    holes = {**tensors, DENSE: np.zeros_like(tensors[DENSE]), QKV + "bias": np.zeros_like(tensors[QKV + "bias"])}
    part = tensors[QKV + "weight"].copy()
    part.reshape(-1)[2048:4096] = 0  # one page of the file system in the middle of a tensor
    write_folder(tmp_path / "hf", TINY, {**holes, QKV + "weight": part}, "safetensors")
    _, remarks = converted(tmp_path / "hf", tmp_path)
    assert f"WARNING: {tmp_path}/hf/model-00001-of-00002.safetensors: key '{DENSE}': all of its" in remarks
    assert f"key '{QKV}weight': 4096 of its 16384 bytes are zeros" in remarks and "bias" not in remarks
    write_folder(tmp_path / "whole", TINY, tensors, "safetensors")
    assert converted(tmp_path / "whole", tmp_path) == (expected, "")


def test_a_hub_s_cache(tmp_path, tensors, expected):
    cache = tmp_path / "hub" / "models--THUDM--chatglm3-6b-32k"
    write_folder(cache / "blobs", TINY, tensors, "bin")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    for number, path in enumerate(sorted((cache / "blobs").iterdir())):
        path.rename(cache / "blobs" / f"{number:040d}")
        (cache / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{number:040d}")
    for folder in (cache, tmp_path / "hub", tmp_path, cache / "snapshots" / "abc"):
        (tmp_path / "out").mkdir(exist_ok=True)
        found, remarks = converted(folder, tmp_path / "out")
        assert found == expected and ("its snapshot abc is used" in remarks) == (folder.name != "abc")
    shutil.copytree(cache / "snapshots" / "abc", cache / "snapshots" / "def", symlinks=True)
    with pytest.raises(
        InputError, match=r"2 snapshots; give the one meant: .*/snapshots/abc \(refs/main\), .*/snapshots/def"
    ):
        converted(cache, tmp_path)
    shutil.rmtree(cache / "snapshots" / "def")
    for path in (cache / "snapshots" / "abc").iterdir():  # as copies without links leave it
        target = os.readlink(path)
        path.unlink()
        path.write_text(target)
    with pytest.raises(InputError, match="the text of a link into a hub's cache.*cp -a"):
        converted(cache, tmp_path)
    shutil.rmtree(cache / "snapshots" / "abc")
    with pytest.raises(InputError, match="a hub's cache without a snapshot"):
        converted(cache, tmp_path)


@pytest.mark.parametrize(
    "prefix", ("module.", "base_model.model.", "_orig_mod.", "model.", "module.model.", "_orig_mod.module.")
)
@pytest.mark.parametrize("kind", ("bin", "safetensors"))
def test_names_inside_a_wrapper(tmp_path, tensors, expected, kind, prefix):
    write_folder(tmp_path / "hf", TINY, {prefix + name: values for name, values in tensors.items()}, kind, 1)
    found, remarks = converted(tmp_path / "hf", tmp_path)
    assert found == expected and f"'{prefix}' is taken off 24 names" in remarks


def test_names_of_the_inner_model_and_of_wrapped_layers(tmp_path, tensors, expected):
    inner = {name[len("transformer.") :]: values for name, values in tensors.items()}
    write_folder(tmp_path / "inner", TINY, inner, "bin", 1)
    assert converted(tmp_path / "inner", tmp_path)[0] == expected
    deep = {name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): v for name, v in tensors.items()}
    write_folder(tmp_path / "deep", TINY, deep, "bin", 1)
    assert converted(tmp_path / "deep", tmp_path)[0] == expected


def test_tensors_that_are_there_twice(tmp_path, tensors, expected):
    halves = {"lm_head.weight": tensors[OUTPUT], "module." + EMBEDDING: tensors[EMBEDDING]}
    for part, (low, high) in {"wq": (0, 64), "wk": (64, 96), "wv": (96, 128)}.items():
        for side in ("weight", "bias"):
            halves[(QKV + side).replace("query_key_value", part)] = tensors[QKV + side][low:high]
    write_folder(tmp_path / "hf", TINY, {**tensors, **halves}, "bin", 1)
    found, remarks = converted(tmp_path / "hf", tmp_path)
    assert found == expected and "key 'lm_head.weight' holds the values of 'transformer.output_layer.weight'" in remarks
    for name in halves:
        other = halves[name].copy()
        other.reshape(-1)[-1] += 1
        write_folder(tmp_path / "hf", TINY, {**tensors, **halves, name: other}, "bin", 1)
        with pytest.raises(InputError, match="holds what '.*' in pytorch_model.bin holds too, and the values are not"):
            converted(tmp_path / "hf", tmp_path)


def test_p_tuning(tmp_path, tensors):
    prefix = random_values({"transformer.prefix_encoder.embedding.weight": (8, 192)}, "fp16")
    for number, content in enumerate((prefix, {**tensors, **prefix})):
        write_folder(tmp_path / str(number), TINY, content, "bin", 1)
        with pytest.raises(InputError, match=r"P-Tuning v2 \(prefix_encoder\).*fine-tune with LoRA"):
            converted(tmp_path / str(number), tmp_path)


def test_adapters_as_the_model(tmp_path):
    name = f"base_model.model.{QKV}lora_A.weight"
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    write_safetensors(tmp_path / "peft" / "adapter_model.safetensors", {name: np.ones((4, 64), np.float32)})
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        with pytest.raises(InputError, match=f"PEFT adapter.*--adapter {tmp_path}/peft --output_path"):
            converted(path, tmp_path)


def test_an_output_that_is_a_folder(tmp_path, tensors):
    write_folder(tmp_path / "hf", TINY, tensors, "bin")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: is a folder; give the name of a file, such as .*/out/model.ckpt"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out.ckpt").exists() and not list((tmp_path / "out").iterdir())


def test_values_that_are_no_numbers_are_named(tmp_path, tensors, expected):
    for dtype in (np.float16, np.float32):
        broken = tensors[DENSE].astype(dtype)
        broken[1, 2:4], broken[3, 5] = np.nan, np.inf
        folder = tmp_path / np.dtype(dtype).name
        write_folder(folder, TINY, {**tensors, DENSE: broken}, "safetensors")
        _, remarks = converted(folder, tmp_path)
        assert f"key '{DENSE}': 3 of its values are NaN or infinite" in remarks and remarks.count("WARNING") == 1


def test_weights_beside_those_that_are_read_are_named(tmp_path, tensors, expected):
    write_folder(tmp_path / "hf", TINY, tensors, "safetensors")
    other = {name: values + 1 for name, values in tensors.items()}
    write_folder(tmp_path / "hf", TINY, other, "bin")
    raw, remarks = converted(tmp_path / "hf", tmp_path)
    assert raw == expected
    assert "that are not read: pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin; model-" in remarks


def test_what_a_folder_without_weights_holds_is_said(tmp_path, tensors):
    (tmp_path / "run" / "runs").mkdir(parents=True)
    (tmp_path / "run" / "glm.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="in this folder, which holds glm.gguf, runs/; other formats are not read"):
        convert(tmp_path / "run", tmp_path / "out.ckpt")
    write_folder(tmp_path / "run" / "checkpoint-40", TINY, tensors, "safetensors")
    with pytest.raises(InputError, match="give the folder meant: .*/run/checkpoint-40$"):
        convert(tmp_path / "run", tmp_path / "out.ckpt")


def test_an_index_that_names_a_key_twice(tmp_path, tensors):
    write_folder(tmp_path / "hf", TINY, tensors, "safetensors")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    text = index.read_text().replace(
        '"weight_map": {', f'"weight_map": {{"{DENSE}": "model-00009-of-00009.safetensors", '
    )
    index.write_text(text)
    with pytest.raises(InputError, match=f"not a usable index .*key '{DENSE}' is given twice"):
        convert(tmp_path / "hf", tmp_path / "out.ckpt")


def test_names_that_are_too_long_are_a_line(tmp_path, capsys):
    long = str(tmp_path / ("x" * 300))
    assert cli.main(["convert", "--input_path", long, "--output_path", str(tmp_path / "o.ckpt")]) == 2
    assert cli.main(["convert", "--input_path", str(tmp_path), "--output_path", long]) == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())

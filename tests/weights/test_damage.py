"""Damaged input of many kinds: the error names file and key, what is there and what was expected; nothing is left."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import convert, convert_reversed

from .synthetic import TINY, chatglm_shapes, random_values, write_folder, write_safetensors, write_torch

FIRST, SECOND = "00001-of-00002", "00002-of-00002"
SAFE, BIN = "model-{}.safetensors", "pytorch_model-{}.bin"
QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
DENSE = "transformer.encoder.layers.2.self_attention.dense.weight"
HALVES = np.zeros((64, 64), np.float16)


def rewrite(folder, kind, change):
    """Writes the folder again with changed tensors."""
    tensors = random_values(chatglm_shapes(TINY), "fp16")
    change(tensors)
    shutil.rmtree(folder)
    write_folder(folder, TINY, tensors, kind)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap(folder, names):
    first, second = (folder / names.format(part) for part in (FIRST, SECOND))
    first.rename(folder / "third")
    second.rename(first)
    (folder / "third").rename(second)


def flip_value(path):
    """Changes one byte in the middle of the largest record."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[info.header_offset + 200 + info.file_size // 2] ^= 0x10
    path.write_bytes(data)


def flip_header(path):
    data = bytearray(path.read_bytes())
    data[data.index(b'"shape"') + 1] ^= 0x02
    path.write_bytes(data)


def move_offsets(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin, end = header[QKV]["data_offsets"]
    header[QKV]["data_offsets"] = [begin + 2, end + 2]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_value(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


# kind of folder, what is done to it, what the error must say
DAMAGES = {
    "missing shard": (
        "safetensors",
        lambda f: (f / SAFE.format(SECOND)).unlink(),
        r"model.safetensors.index.json: 1 of 2 shards are missing.*model-00002-of-00002.safetensors",
    ),
    "missing .bin shard without index": (
        "bin",
        lambda f: ((f / BIN.format(SECOND)).unlink(), (f / "pytorch_model.bin.index.json").unlink()),
        r"1 of 2 shards are missing: pytorch_model-00002-of-00002.bin",
    ),
    "truncated safetensors": (
        "safetensors",
        lambda f: cut(f / SAFE.format(SECOND), -1000),
        r"00002-of-00002.safetensors: the file is cut off: \d+ bytes, \d+ expected; key '.*' is "
        r"the first",
    ),
    "safetensors cut in the header": (
        "safetensors",
        lambda f: cut(f / SAFE.format(FIRST), 100),
        r"00001-of-00002.safetensors: not a safetensors file, or cut off in its header",
    ),
    "truncated .bin": (
        "bin",
        lambda f: cut(f / BIN.format(SECOND), -1000),
        r"pytorch_model-00002-of-00002.bin: the file is cut off or corrupt",
    ),
    "flipped bits in a .bin": (
        "bin",
        lambda f: flip_value(f / BIN.format(FIRST)),
        r"00001-of-00002.bin: key 'transformer.embedding.word_embeddings.weight' is corrupt: "
        r"the file's checksum \(CRC-32\) of it is [0-9a-f]{8}, its bytes give [0-9a-f]{8}",
    ),
    "corrupt safetensors header": (
        "safetensors",
        lambda f: flip_header(f / SAFE.format(FIRST)),
        r"00001-of-00002.safetensors: key '.*': corrupt entry",
    ),
    "overlapping tensors": (
        "safetensors",
        lambda f: move_offsets(f / SAFE.format(FIRST)),
        rf"00001-of-00002.safetensors: key '{QKV}': its data start at byte \d+, \d+ is expected",
    ),
    "swapped shards": (
        "safetensors",
        lambda f: swap(f, SAFE),
        r"key '.*' is in this shard, the index expects it in model-00001-of-00002.safetensors",
    ),
    "swapped .bin shards": (
        "bin",
        lambda f: swap(f, BIN),
        r"key '.*' is in this shard, the index expects it in pytorch_model-00001-of-00002.bin",
    ),
    "a shard twice": (
        "safetensors",
        lambda f: shutil.copy(f / SAFE.format(FIRST), f / SAFE.format(SECOND)),
        r"00002-of-00002.safetensors: key '.*' is also in model-00001-of-00002.safetensors",
    ),
    "a key missing from its shard": (
        "safetensors",
        lambda f: write_safetensors(
            f / SAFE.format(SECOND),
            {
                name: value
                for name, value in random_values(chatglm_shapes(TINY), "fp16").items()
                if ("layers.2" in name or "final" in name or "output" in name) and name != DENSE
            },
        ),
        rf"00002-of-00002.safetensors: key '{DENSE}' is missing from it, the index says",
    ),
    "a key nobody expects": (
        "safetensors",
        lambda f: rewrite(
            f, "safetensors", set_value("transformer.encoder.layers.3.input_layernorm.weight", np.zeros(64, np.float16))
        ),
        r"'transformer.encoder.layers.3.input_layernorm.weight' is left over: a model of 3 layers has no such",
    ),
    "an unknown key": (
        "bin",
        lambda f: rewrite(f, "bin", set_value("transformer.extra.weight", HALVES[0])),
        r"pytorch_model-00002-of-00002.bin: 'transformer.extra.weight' is not a weight of ChatGLM3",
    ),
    "a key missing everywhere": (
        "bin",
        lambda f: rewrite(f, "bin", lambda tensors: tensors.pop(DENSE)),
        rf"missing: '{DENSE}' or 'model.layers.2.self_attn.o_proj.weight'",
    ),
    "wrong shape": (
        "safetensors",
        lambda f: rewrite(f, "safetensors", set_value(DENSE, HALVES[:, :32])),
        rf"00002-of-00002.safetensors: key '{DENSE}' has shape \(64, 32\), expected \(64, 64\)",
    ),
    "quantized weights": (
        "safetensors",
        lambda f: rewrite(f, "safetensors", set_value(DENSE, HALVES.astype(np.int64))),
        rf"key '{DENSE}' has dtype I64, fp32, fp16, bf16 are understood; quantized",
    ),
    "another model's config": (
        "bin",
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="llama")),
        r"config.json: model_type is 'llama'",
    ),
    "config of other sizes": (
        "bin",
        lambda f: edit_json(f / "config.json", lambda c: c.update(ffn_hidden_size=128)),
        r"6 problems:(.|\n)*dense_h_to_4h.weight' has shape \(320, 64\), expected \(256, 64\)",
    ),
    "config without sizes": (
        "bin",
        lambda f: edit_json(f / "config.json", lambda c: c.pop("kv_channels")),
        r"config.json: kv_channels is None, a positive number is needed",
    ),
    "config no JSON": ("bin", lambda f: cut(f / "config.json", 30), r"config.json: cannot be read as JSON"),
    "index no JSON": ("bin", lambda f: cut(f / "pytorch_model.bin.index.json", 50), r"index.json: not a usable index"),
    "index that leaves the folder": (
        "bin",
        lambda f: edit_json(
            f / "pytorch_model.bin.index.json", lambda c: c["weight_map"].update({DENSE: "../other/x.bin"})
        ),
        r"index.json: not a usable index.*a file in the same folder",
    ),
    "empty shard": (
        "safetensors",
        lambda f: cut(f / SAFE.format(FIRST), 0),
        r"00001-of-00002.safetensors: the file is empty",
    ),
    "Git LFS pointer": (
        "safetensors",
        lambda f: (f / SAFE.format(FIRST)).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
        ),
        r"00001-of-00002.safetensors: a Git LFS pointer.*git lfs pull",
    ),
    "a web page": (
        "bin",
        lambda f: (f / BIN.format(FIRST)).write_text("<html>Not found</html>"),
        r"pytorch_model-00001-of-00002.bin: not a PyTorch file",
    ),
    "a record missing from a .bin": (
        "bin",
        lambda f: drop_record(f / BIN.format(FIRST)),
        r"key '.*': its record pytorch_model-00001-of-00002/data/2 is missing",
    ),
    "fused and split at once": (
        "bin",
        lambda f: rewrite(f, "bin", set_value(QKV.replace("query_key_value", "wk"), np.zeros((32, 64), np.float16))),
        r"wk.weight' holds what '.*query_key_value.weight' in .*.bin holds too",
    ),
}


def drop_record(path):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if not name.endswith("data/2")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_input(tmp_path, damage):
    kind, harm, message = DAMAGES[damage]
    write_folder(tmp_path / "hf", TINY, random_values(chatglm_shapes(TINY), "fp16"), kind)
    convert(tmp_path / "hf", tmp_path / "good" / "out.ckpt")  # undamaged it converts
    harm(tmp_path / "hf")
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(InputError, match=message) as error:
        convert(tmp_path / "hf", output / "out.ckpt")
    assert str(tmp_path / "hf") in str(error.value)
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    "format, keep, message",
    (
        ("ckpt", -100, "in.ckpt: not a MindSpore checkpoint, or cut off or encrypted"),
        ("ckpt", 40, "in.ckpt: not a MindSpore checkpoint"),
        ("ckpt", 0, "in.ckpt: the file is empty"),
        ("safetensors", -100, "in.safetensors: the file is cut off"),
    ),
)
def test_damaged_mindspore_checkpoint(tmp_path, format, keep, message):
    write_folder(tmp_path / "hf", TINY, random_values(chatglm_shapes(TINY), "fp16"), "bin")
    convert(tmp_path / "hf", tmp_path / f"in.{format}")
    cut(tmp_path / f"in.{format}", keep)
    with pytest.raises(InputError, match=message):
        convert_reversed(tmp_path / f"in.{format}", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))


def test_an_older_output_survives_a_failure(tmp_path):
    write_folder(tmp_path / "hf", TINY, random_values(chatglm_shapes(TINY), "fp16"), "bin")
    convert(tmp_path / "hf", tmp_path / "out.ckpt")
    before = {name: (tmp_path / name).read_bytes() for name in ("out.ckpt", "out.report.json")}
    flip_value(tmp_path / "hf" / BIN.format(FIRST))
    with pytest.raises(InputError):
        convert(tmp_path / "hf", tmp_path / "out.ckpt")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_file_without_valid_checksums_can_be_converted_on_request(tmp_path):
    """torch can be told not to compute them; then --no_crc is the way."""
    tensors = random_values(chatglm_shapes(TINY), "fp16")
    write_folder(tmp_path / "hf", TINY, tensors, "bin")
    flip_value(tmp_path / "hf" / BIN.format(FIRST))
    convert(tmp_path / "hf", tmp_path / "out.ckpt", check_crc=False)
    assert (tmp_path / "out.ckpt").is_file()


def test_views_in_a_bin_are_converted(tmp_path):
    """Tied or transposed storages, as some tools save them."""
    tensors = random_values(chatglm_shapes(TINY), "fp32")
    plain, odd = tmp_path / "plain", tmp_path / "odd"
    write_folder(plain, TINY, tensors, "bin", shards=1)
    write_folder(odd, TINY, tensors, "bin", shards=1)
    stored = dict(tensors)
    stored[DENSE] = np.ascontiguousarray(tensors[DENSE].T)
    stored[QKV] = np.concatenate([np.zeros((3, 64), np.float32), tensors[QKV]])
    write_torch(
        odd / "pytorch_model.bin", stored, views={DENSE: (0, (64, 64), (1, 64)), QKV: (3 * 64, (128, 64), (64, 1))}
    )
    for options in (dict(), dict(qkv_concat=False, mlp_concat=False, dtype="bf16")):
        for name, folder in (("a", plain), ("b", odd)):
            convert(folder, tmp_path / f"{name}.ckpt", **options)
        assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()

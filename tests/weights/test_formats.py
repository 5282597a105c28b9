"""The .ckpt framing against MindSpore's own writer and reader."""

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import formats
from mindformers_glm32k.weights.checkpoint import read_index
from mindformers_glm32k.weights.formats import ckpt_frame, read_ckpt
from weights.synthetic import write_safetensors


def _write(path, tensors):
    with open(path, "wb") as handle:
        for name, dtype, values in tensors:
            raw, position = values.tobytes(), 0
            for before, length in ckpt_frame(name, values.shape, dtype):
                handle.write(before + raw[position : position + length])
                position += length


def _examples():
    generator = np.random.default_rng(0)
    return [
        ("a.weight", "fp32", generator.standard_normal((300, 7)).astype(np.float32)),
        ("b.weight", "fp16", generator.standard_normal(130).astype(np.float16)),
    ]


def test_bytes_are_those_of_mindspore(tmp_path):
    import mindspore

    ours, theirs = tmp_path / "ours.ckpt", tmp_path / "theirs.ckpt"
    _write(ours, _examples())
    mindspore.save_checkpoint(
        [{"name": name, "data": mindspore.Tensor(values)} for name, _, values in _examples()], str(theirs)
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_slices_of_a_large_tensor(tmp_path, monkeypatch):
    import mindspore

    monkeypatch.setattr(formats, "SLICE_BYTES", 1000)
    path = tmp_path / "sliced.ckpt"
    _write(path, _examples())
    loaded = mindspore.load_checkpoint(str(path))
    tensors = {tensor.name: tensor for tensor in read_ckpt(path)}
    assert len(tensors["a.weight"].segments) == 9
    for name, _, values in _examples():
        assert np.array_equal(loaded[name].asnumpy(), values)
        assert np.array_equal(tensors[name].load(), values)
    parts = [part.copy() for part in tensors["a.weight"].chunks(512, 2000, 6004)]  # across slices
    assert np.array_equal(np.concatenate(parts), _examples()[0][2].reshape(-1)[500:1501])


def test_read_index_of_a_training_checkpoint(tmp_path):
    import mindspore

    path = tmp_path / "training.ckpt"
    mindspore.save_checkpoint(
        [
            {"name": "w", "data": mindspore.Tensor(np.zeros((2, 3)), mindspore.bfloat16)},
            {"name": "step", "data": mindspore.Tensor(np.array([7], np.int32))},
            {"name": "scalar", "data": mindspore.Tensor(1.5, mindspore.float32)},
        ],
        str(path),
        append_dict={"note": "text", "epoch_num": 3},
        crc_check=True,
    )
    index = read_index(path)
    assert index["w"] == ((2, 3), "bf16")
    assert index["step"] == ((1,), "Int32")
    assert index["scalar"] == ((), "fp32")
    assert index["note"][1] == "str" and index["epoch_num"][1].startswith("Int")


def test_read_index_of_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(
        path, {"w": np.zeros((2, 3), np.float16), "b": np.zeros(4, np.uint16), "n": np.zeros(2, np.int64)}
    )
    assert read_index(path) == {"w": ((2, 3), "fp16"), "b": ((4,), "bf16"), "n": ((2,), "I64")}


def test_every_cut_of_a_checkpoint_is_an_input_error(tmp_path):
    path, cut = tmp_path / "whole.ckpt", tmp_path / "cut.ckpt"
    _write(path, _examples())
    data = path.read_bytes()
    boundary = len(data) - len(_examples()[1][2].tobytes()) - len(ckpt_frame("b.weight", (130,), "fp16")[0][0])
    for length in [*range(1, 60), *range(60, len(data), 97)]:
        cut.write_bytes(data[:length])
        if length == boundary:
            continue  # a checkpoint of one tensor less is a whole checkpoint
        with pytest.raises(InputError, match="cut.ckpt: not a MindSpore checkpoint, or cut off"):
            read_index(cut)


@pytest.mark.parametrize("data", (b"PK\x03\x04 a zip", b"<html>", b"\x00" * 64, b"\x0a" + b"\xff" * 10))
def test_other_files_are_input_errors(tmp_path, data):
    path = tmp_path / "other.ckpt"
    path.write_bytes(data)
    with pytest.raises(InputError, match="other.ckpt"):
        read_index(path)


def test_missing_and_empty(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_index(tmp_path / "none.ckpt")
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(InputError, match="empty"):
        read_index(tmp_path / "empty.ckpt")

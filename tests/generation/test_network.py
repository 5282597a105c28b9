"""Digests of the model in an answer file's stamp."""

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.network import checkpoint_hash, config_hash


def test_checkpoints_are_told_apart_by_their_bytes(tmp_path):
    for name, content in (("a.ckpt", b"one"), ("b.ckpt", b"one"), ("c.ckpt", b"two")):
        (tmp_path / name).write_bytes(content)
    first, same, other = (checkpoint_hash(tmp_path / f"{name}.ckpt") for name in "abc")
    assert first == same != other and first.startswith("sha256:")
    folder = checkpoint_hash(tmp_path)
    (tmp_path / "log.txt").write_text("no weights")
    assert checkpoint_hash(tmp_path) == folder
    (tmp_path / "c.ckpt").write_bytes(b"three")
    assert checkpoint_hash(tmp_path) != folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no weights in it"):
        checkpoint_hash(tmp_path / "empty")


def test_configs_are_told_apart_by_the_model_alone():
    config = {"rope_ratio": 50, "compute_dtype": "float16", "batch_size": 1, "num_blocks": 64}
    assert config_hash(config) == config_hash({**config, "batch_size": 8, "num_blocks": 640})
    assert config_hash(config) != config_hash({**config, "rope_ratio": 1})

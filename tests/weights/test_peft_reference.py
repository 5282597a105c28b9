"""Adapters against PEFT itself: its logits from our merge, our folder in its loader.

Needs torch, transformers and peft, which the project does not: an interpreter that has them is named by
GLM32K_TORCH_PYTHON; without one the tests are skipped, and test_peft.py holds the arithmetic.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindformers_glm32k.weights import convert, convert_reversed
from mindformers_glm32k.weights.lora import write_adapter

from .synthetic import TINY, chatglm_shapes, random_values, write_folder
from .test_peft import DIMS, TARGETS, adapters

PYTHON = os.environ.get("GLM32K_TORCH_PYTHON", sys.executable)


def run(*arguments):
    script = Path(__file__).with_name("peft_reference.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([PYTHON, script, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module", autouse=True)
def needs_peft():
    try:
        found = subprocess.run([PYTHON, "-c", "import torch, transformers, peft"], capture_output=True, check=False)
    except OSError:
        found = None
    if found is None or found.returncode:
        pytest.skip("no torch, transformers and peft here: name an interpreter that has them, GLM32K_TORCH_PYTHON=…")


def values():
    """Large enough that every layer moves the logits; norms around 1."""
    found = random_values(chatglm_shapes(TINY), "fp32")
    return {name: 1 + 5 * value if "norm" in name else 5 * value for name, value in found.items()}


def test_merged_logits_are_peft_s(tmp_path):
    write_folder(tmp_path / "hf", TINY, values(), "safetensors")
    convert_reversed(tmp_path / "hf", tmp_path / "glm", hf_naming="glm")
    (tmp_path / "peft").mkdir()
    run("make", tmp_path / "glm", tmp_path / "peft")
    plain = np.load(tmp_path / "peft" / "base.npy")
    for name in ("plain", "patterns", "all-linear"):
        expected = np.load(tmp_path / "peft" / f"{name}.npy")
        convert(tmp_path / "glm", tmp_path / f"{name}.ckpt", adapter=tmp_path / "peft" / name)
        convert_reversed(tmp_path / f"{name}.ckpt", tmp_path / f"{name}_glm", hf_naming="glm")
        run("logits", tmp_path / f"{name}_glm", tmp_path / f"{name}.npy")
        scale = np.abs(expected).max()
        assert np.abs(np.load(tmp_path / f"{name}.npy") - expected).max() < 1e-5 * scale, name
        assert np.abs(plain - expected).max() > 0.05 * scale  # control: the adapter changes them


def test_peft_loads_what_is_written(tmp_path):
    tensors = values()
    linear = {name: v for name, v in tensors.items() if any(name.endswith(t + ".weight") for t in TARGETS.values())}
    np.savez(tmp_path / "weights.npz", **linear)
    pairs = adapters(tensors, rank=lambda module: 2 if ".1." in module else 4)
    ours = {
        f"{module}.mindpet_delta_lora_{side}": (value, "fp32")
        for module, pair in pairs.items()
        for side, value in zip("ab", pair)
    }
    write_adapter(tmp_path / "peft", ours, 0.75, DIMS)
    run("merge", tmp_path / "weights.npz", tmp_path / "peft", tmp_path / "merged.npz")
    found = np.load(tmp_path / "merged.npz")
    for module, (a, b) in pairs.items():
        expected = linear[module + ".weight"] + 0.75 * b @ a
        np.testing.assert_allclose(found[module + ".weight"], expected, rtol=1e-5, atol=1e-5)


def test_peft_loads_what_is_written_for_glm(tmp_path):
    """An adapter on the folder that `glm32k export` writes: logits of the merged model."""
    tensors = values()
    write_folder(tmp_path / "hf", TINY, tensors, "safetensors")
    convert_reversed(tmp_path / "hf", tmp_path / "glm", hf_naming="glm")
    pairs = adapters(tensors, rank=lambda module: 2 if ".1." in module else 4)
    ours = {
        f"{module}.mindpet_delta_lora_{side}": (0.2 * value, "fp32")
        for module, pair in pairs.items()
        for side, value in zip("ab", pair)
    }
    write_adapter(tmp_path / "peft", ours, 0.75, DIMS, "glm")
    run("adapted", tmp_path / "glm", tmp_path / "peft", tmp_path / "found.npy")
    convert(tmp_path / "hf", tmp_path / "merged.ckpt", adapter=tmp_path / "peft")
    convert_reversed(tmp_path / "merged.ckpt", tmp_path / "merged", hf_naming="glm")
    run("logits", tmp_path / "merged", tmp_path / "expected.npy")
    run("logits", tmp_path / "glm", tmp_path / "plain.npy")
    found, expected, plain = (np.load(tmp_path / f"{name}.npy") for name in ("found", "expected", "plain"))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.05 * np.abs(expected).max()  # control: the adapter changes them

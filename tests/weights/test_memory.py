"""The published seven-shard layout with scaled sizes: memory stays bounded while everything streams through."""

import json
import subprocess
import sys

import pytest

from mindformers_glm32k.weights.checkpoint import open_source

from .synthetic import chatglm_shapes, random_values, write_folder

# All 28 layers and the published vocabulary at a sixteenth of the width: 120 MB in fp16, the largest tensor 33 MB.
SCALED = {
    "num_layers": 28,
    "hidden_size": 256,
    "num_attention_heads": 32,
    "kv_channels": 8,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 856,
    "padded_vocab_size": 65024,
}
MEASURE = """
import sys
sys.path.insert(0, {root!r})
from mindformers_glm32k.weights import convert

def peak():  # of this program; getrusage would count what the process was before it
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
convert({source!r}, {output!r}, {options})
print(before, peak())
"""


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "hf"
    index = json.loads((reference / "chatglm3-6b_pytorch_model.bin.index.json").read_text())["weight_map"]
    place = {name: int(file.split("-")[1]) - 1 for name, file in index.items()}
    shapes = chatglm_shapes(SCALED)
    assert set(shapes) - set(place) <= {"transformer.rotary_pos_emb.inv_freq"}
    tensors = random_values({name: shape for name, shape in shapes.items() if name in place}, "fp16")
    write_folder(folder, SCALED, tensors, "bin", shards=7, place=place)
    return folder


@pytest.mark.parametrize("options", ("dtype='fp32'", "dtype='bf16', qkv_concat=False, mlp_concat=False"))
def test_memory_does_not_grow_with_the_model(published, tmp_path, options):
    from conftest import ROOT

    program = MEASURE.format(root=str(ROOT), source=str(published), output=str(tmp_path / "out.ckpt"), options=options)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, peak = (int(word) / 1024 for word in result.stdout.split())
    print(f"peak {peak:.0f} MB, {peak - before:.0f} MB of it for the conversion")
    largest = 65024 * 256 * (4 if "fp32" in options else 2) / 2**20  # MB
    assert peak < 2 * largest + 500  # the promise
    assert peak - before < 32  # what streaming really takes: less than one tensor
    assert len(open_source(tmp_path / "out.ckpt").tensors) == (199 if "fp32" in options else 199 + 28 * 5)

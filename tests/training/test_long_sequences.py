"""A training step's memory is linear in the sequence length, not quadratic."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

STEP = """
import resource, sys
import numpy as np
import mindspore as ms
ms.set_context(mode=ms.GRAPH_MODE)
from mindformers.core.optim import AdamW
from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration
from mindformers_glm32k.training.step import GLM32KTrainOneStepCell

length = int(sys.argv[1])
network = GLM32KForConditionalGeneration(GLM32KConfig(
    num_layers=1, hidden_size=64, num_attention_heads=4, kv_channels=16, multi_query_group_num=2, ffn_hidden_size=160,
    padded_vocab_size=512, seq_length=length, use_flash_attention=True, param_init_type="float32",
    compute_dtype="float32"))
step = GLM32KTrainOneStepCell(network.set_train(), AdamW(network.trainable_params(), 1e-3)).set_train()
ids = np.random.default_rng(0).integers(0, 512, (1, length)).astype(np.int32)
loss = float(step(ms.Tensor(ids), ms.Tensor(ids))[0].asnumpy())
assert np.isfinite(loss)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(length):
    """MB of a process that trains one step on a sequence of so many tokens."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(length)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_grows_linearly():
    short, long = peak(4096), peak(16384)
    # what grows with the square, the scores of four heads, would be 4.3 GB for 16384 tokens and 0.3 GB for 4096
    assert long - short < 400, (short, long)

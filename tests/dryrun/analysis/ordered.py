"""Runs a training step on the CPU, and leaves what MindSpore says about it in the working folder.

    python ordered.py NET ORDER SIZE

NET is "layers" (SIZE transformer layers) or "chunks" (a loss in SIZE chunks); ORDER is bfs or dfs. Leaves
program.mindir (what the dry run reads), dump/ (the backend's graph and the order of its kernels) and tracker/task.csv
(what ran when), and prints the peak of the memory pool, all written by MindSpore.
"""

import json
import os
import sys
from pathlib import Path

NET, ORDER, SIZE = sys.argv[1], sys.argv[2], int(sys.argv[3])
DUMP = Path("dump").resolve()
SETTINGS = {
    "op_debug_mode": 0,
    "dump_mode": 1,
    "path": str(DUMP),
    "net_name": "net",
    "iteration": "0",
    "saved_data": "tensor",
    "input_output": 0,
    "kernels": ["Default/no-such-kernel"],
    "support_device": [0],
    "file_format": "npy",
}
Path("dump.json").write_text(json.dumps({"common_dump_settings": SETTINGS, "e2e_dump_settings": {"enable": True}}))
os.environ["MINDSPORE_DUMP_CONFIG"] = str(Path("dump.json").resolve())  # before MindSpore is imported, as the next one
os.environ["MS_DEV_RUNTIME_CONF"] = "memory_statistics:True"
os.environ["MS_ALLOC_CONF"] = f"memory_tracker:True,memory_tracker_path:{Path('tracker').resolve()}"

import mindspore  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor, nn, ops  # noqa: E402
from mindspore.common.api import _cell_graph_executor  # noqa: E402

WIDTH = 64


class Layer(nn.Cell):
    """Norm, attention with one head, gated MLP."""

    def __init__(self):
        super().__init__()
        self.norm, self.softmax = nn.LayerNorm((WIDTH,)), ops.Softmax()
        self.query, self.key = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, WIDTH)
        self.up, self.down = nn.Dense(WIDTH, 4 * WIDTH), nn.Dense(2 * WIDTH, WIDTH)
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()

    def construct(self, hidden):
        normed = self.norm(hidden)
        attention = self.softmax(self.scores(self.query(normed), self.key(normed)))
        hidden = hidden + self.mix(attention, normed)
        gate, up = ops.chunk(self.up(hidden), 2, -1)
        return hidden + self.down(ops.relu(gate) * up)


class Layers(nn.Cell):
    """Layers and a loss over all positions."""

    def __init__(self):
        super().__init__()
        self.layers = nn.SequentialCell([Layer() for _ in range(SIZE)])
        self.output = nn.Dense(WIDTH, 512)

    def construct(self, hidden):
        return ops.square(self.output(self.layers(hidden))).sum()


class Chunks(nn.Cell):
    """The loss in chunks, each with logits of its own."""

    def __init__(self):
        super().__init__()
        self.output = nn.Dense(WIDTH, 4096)

    def construct(self, hidden):
        loss = 0.0
        for chunk in ops.chunk(hidden, SIZE, 1):
            loss = loss + ops.log(ops.exp(ops.tanh(self.output(chunk))).sum(-1)).sum()
        return loss


mindspore.set_seed(0)
mindspore.context.set_context(mode=0, device_target="CPU", exec_order=ORDER)
net = Layers() if NET == "layers" else Chunks()
train = nn.TrainOneStepCell(net, nn.AdamWeightDecay(net.trainable_params())).set_train()
train(Tensor(np.random.randn(4, 1024, WIDTH).astype(np.float32)))
program = _cell_graph_executor._graph_executor.get_func_graph_proto(next(iter(train.compile_cache)), "mind_ir")
Path("program.mindir").write_bytes(program)

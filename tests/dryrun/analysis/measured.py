"""Measures what a graph that was compiled for the CPU really needs when it runs, and reads the same graph as the dry
run does.

    python measured.py NET ROWS WIDTH

NET is a key of NETS. Prints JSON: "measured", the growth of resident memory from before the run to its peak; "read",
the liveness peak of the program; both in bytes. Weights and the gradient that comes from outside are inputs, so that
neither parameters that are copied when first used nor constants are in what is measured.
"""

import json
import sys

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_glm32k.dryrun.analysis.cost import measure
from mindformers_glm32k.dryrun.analysis.mindir import read_program
from mindformers_glm32k.dryrun.analysis.trace import trace_program

PROGRAM = "measured.mindir"


class MLP(nn.Cell):
    """Matrix products with ReLU between them."""

    @staticmethod
    def weights(width):
        return [(width, width)] * 4

    def construct(self, rows, first, second, third, fourth):
        for weight in (first, second, third, fourth):
            rows = ops.relu(ops.matmul(rows, weight))
        return rows


class Gated(nn.Cell):
    """SwiGLU: two products, an activation, one product."""

    @staticmethod
    def weights(width):
        return [(width, 2 * width), (width, 2 * width), (2 * width, width)]

    def construct(self, rows, gate, up, down):
        gate = ops.matmul(rows, gate)
        return ops.matmul(ops.sigmoid(gate) * gate * ops.matmul(rows, up), down)


class Norms(nn.Cell):
    """Layer norms with products between them."""

    def __init__(self):
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=1, begin_params_axis=1)

    @staticmethod
    def weights(width):
        return [(width,), (width,), (width, width), (width, width)]

    def construct(self, rows, gamma, beta, first, second):
        for weight in (first, second):
            rows = ops.matmul(self.norm(rows, gamma, beta)[0], weight)
        return rows


class Activations(nn.Cell):
    """A chain of activations whose results wait for the backward."""

    @staticmethod
    def weights(_):
        return []

    def construct(self, rows):
        for _ in range(3):
            rows = ops.tanh(ops.sigmoid(rows))
        return rows


NETS = {"mlp": MLP, "gated": Gated, "norms": Norms, "activations": Activations}


class Step(nn.Cell):
    """Forward and backward."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, outer, *inputs):
        return self.gradient(self.network)(*inputs, outer)


def resident(what):
    """Bytes: "VmRSS" now, "VmHWM" at most since the last reset."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def main(net, rows, width):
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    rng = np.random.default_rng(0)
    step = Step(NETS[net]())
    data = [
        Tensor(rng.standard_normal(shape).astype(np.float32) * 0.02)
        for shape in [(rows, width), (rows, width), *NETS[net].weights(width)]
    ]
    step.compile(*data)
    from mindspore.nn.cell import _cell_graph_executor

    (phase,) = step.compile_cache
    with open(PROGRAM, "wb") as file:
        file.write(_cell_graph_executor._graph_executor.get_func_graph_proto(phase, "mind_ir"))
    used = measure(trace_program(read_program(PROGRAM)))
    with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
        peak.write("5")  # the peak starts again at what is resident now
    before = resident("VmRSS")
    step(*data)
    print(
        json.dumps({"measured": resident("VmHWM") - before, "read": used.activation_peak, "constants": used.constants})
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""A program of 16 bits, executed in float32.

The kernels of prediction (ApplyRotaryPosEmb, PagedAttention) take 16 bits only, and the compiler insists on it. Rounding
hides small mistakes and makes greedy decoding choose another token now and then; widened, the same program with the same
cuts and collectives computes what it states to seven digits.
"""

from dataclasses import replace

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Graph, Program, Spec
from mindformers_glm32k.dryrun.simulator.operators.values import from_bytes

_NARROW = ("float16", "bfloat16")


def widen(program):
    """The program with float32 wherever it has float16 or bfloat16.

    Args:
        program (Program): compiled.

    Returns:
        Program: constants and parameters included; a cast to 16 bits does nothing.
    """

    def graph(old):
        return Graph(old.name, old.inputs, [_node(node) for node in old.nodes], old.outputs)

    return Program(
        graph(program.main),
        {name: graph(old) for name, old in program.graphs.items()},
        {node: (name, _spec(spec)) for node, (name, spec) in program.parameters.items()},
        {name: _spec(spec) for name, spec in program.inputs.items()},
    )


def widen_values(values):
    """dict[str, numpy.ndarray]: float16 arrays as float32, others as they are."""
    return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in values.items()}


def _node(node):
    data = node.data
    if isinstance(node.value, Spec) and node.value.dtype in _NARROW:
        data = from_bytes(data, node.value).astype(np.float32).tobytes()
    return replace(node, output=_spec(node.output), value=_spec(node.value), data=data)


def _spec(value):
    if isinstance(value, tuple):
        return tuple(_spec(item) for item in value)
    if isinstance(value, Spec) and value.dtype in _NARROW:
        return replace(value, dtype="float32", itemsize=4)
    return value

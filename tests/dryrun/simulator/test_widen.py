"""Programs of 16 bits in float32."""

import numpy as np
import pytest

from mindformers_glm32k.dryrun.analysis.mindir import Graph, Node, Program, Spec
from mindformers_glm32k.dryrun.simulator.interpreter import RankInterpreter, widen
from mindformers_glm32k.dryrun.simulator.network import Network
from mindformers_glm32k.dryrun.simulator.operators import wide

X = np.array([1.0, 1000.0], np.float32)
STEP = np.array([0.1, 0.1])


def program(dtype):
    """x + weight in 16 bits + a constant of 16 bits, cast back; the sum in a graph of its own."""
    narrow, wide = Spec((2,), dtype, 2), Spec((2,), "float32", 4)
    bits = (
        STEP.astype(np.float16)
        if dtype == "float16"
        else (STEP.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    )
    add = Graph("add", ["a", "b"], [Node("sum", "Add", ["a", "b"], narrow)], ["sum"])
    nodes = [
        Node("type", "Constant", [], value=42),
        Node("cast", "Cast", ["x", "type"], narrow),
        Node("step", "Constant", [], value=narrow, data=bits.tobytes()),
        Node("more", "call", ["cast", "step"], narrow, callee="add"),
        Node("all", "call", ["more", "main:w"], narrow, callee="add"),
        Node("pair", "MakeTuple", ["all", "all"], (narrow, narrow)),
        Node("zero", "Constant", [], value=0),
        Node("item", "TupleGetItem", ["pair", "zero"], narrow),
        Node("result", "Cast", ["item", "type"], wide),
    ]
    return Program(Graph("main", ["x"], nodes, ["result"]), {"add": add}, {"main:w": ("w", narrow)}, {"x": wide})


def run(compiled, weight):
    return RankInterpreter(compiled, 0, Network(1), {"w": weight}).run([X])


@pytest.mark.parametrize("dtype, step", [("float16", np.float16(0.1)), ("bfloat16", 0.099609375)])
def test_a_widened_program_does_not_round(dtype, step):
    weight = np.array([1e-4, 1e-4], np.float32)
    result = run(widen(program(dtype)), weight)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, X + np.float32(step) + weight, rtol=1e-7)
    assert np.abs(run(program(dtype), weight) - result).max() > 1e-4  # the program itself does


def test_the_compiled_program_stays_as_it_is():
    compiled = program("float16")
    widen(compiled)
    assert compiled.main.nodes[1].output.dtype == "float16" and compiled.parameters["main:w"][1].itemsize == 2


def test_values_of_16_bits_only_are_widened():
    assert wide(np.ones(2, np.float16)).dtype == np.float32 and wide(np.ones(2, np.int32)).dtype == np.int32

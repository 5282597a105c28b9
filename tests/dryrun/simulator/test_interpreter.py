"""The interpreter on small programs written by hand."""

import numpy as np
import pytest

from mindformers_glm32k.dryrun.analysis.mindir import Graph, Node, Program, Spec
from mindformers_glm32k.dryrun.simulator.interpreter import RankInterpreter, SimulationError
from mindformers_glm32k.dryrun.simulator.network import Network, run_ranks
from mindformers_glm32k.dryrun.simulator.operators import round_bfloat16

FLOAT = Spec((2,), "float32", 4)
SCALAR = Spec((), "float32", 4)
BOOL = Spec((), "bool", 1)


def constant(name, value):
    """A constant tensor."""
    array = np.asarray(value, np.float32)
    return Node(name, "Constant", [], value=Spec(array.shape, "float32", 4), data=array.tobytes())


def program(nodes, outputs, graphs=(), parameters=(), inputs=("x",), spec=FLOAT):
    return Program(
        Graph("main", list(inputs), nodes, list(outputs)),
        {graph.name: graph for graph in graphs},
        {f"main:{name}": (name, Spec(np.shape(value), "float32", 4, name)) for name, value in parameters},
        {name: spec for name in inputs},
    )


def interpreter(compiled, parameters=(), **options):
    return RankInterpreter(
        compiled, 0, Network(1), {name: np.asarray(value, np.float32) for name, value in parameters}, **options
    )


def x(*values):
    return [np.array(values, np.float32)]


def test_nodes_calls_and_tuples():
    double = Graph(
        "double",
        ["a"],
        [Node("two", "Constant", [], value=2.0), Node("twice", "Muls", ["a", "two"], FLOAT, instance="")],
        ["twice"],
    )
    nodes = [
        Node("called", "call", ["x"], FLOAT, callee="double"),
        Node("both", "MakeTuple", ["x", "called"], (FLOAT, FLOAT)),
        Node("one", "Constant", [], value=1),
        Node("second", "TupleGetItem", ["both", "one"], FLOAT),
        Node("sum", "Add", ["second", "x"], FLOAT),
    ]
    np.testing.assert_array_equal(interpreter(program(nodes, ["sum"], [double])).run(x(1, 2)), [3, 6])


def test_closures_keep_their_arguments():
    add = Graph("add", ["a", "b"], [Node("s", "Add", ["a", "b"], FLOAT)], ["s"])
    nodes = [
        Node("function", "Constant", [], value="add", callee="add"),
        Node("closure", "Partial", ["function", "x"]),
        constant("ten", [10, 20]),
        Node("result", "call", ["ten"], FLOAT, callee="closure"),
    ]
    np.testing.assert_array_equal(interpreter(program(nodes, ["result"], [add])).run(x(1, 2)), [11, 22])


@pytest.mark.parametrize("values, expected", [((3, 0), 1.0), ((-3, 0), -1.0)])
def test_switch_chooses_a_closure(values, expected):
    yes = Graph("yes", [], [constant("up", [1, 1])], ["up"])
    no = Graph("no", [], [constant("down", [-1, -1])], ["down"])
    axes = Node("axes", "Constant", [], value=(0,))
    keep = Node("keep", "Constant", [], value=0)
    nodes = [
        axes,
        keep,
        constant("zero", 0),
        Node("sum", "ReduceSum", ["x", "axes", "keep"], SCALAR),
        Node("positive", "Greater", ["sum", "zero"], BOOL),
        Node("a", "Constant", [], value="yes", callee="yes"),
        Node("b", "Constant", [], value="no", callee="no"),
        Node("chosen", "Switch", ["positive", "a", "b"]),
        Node("result", "call", [], FLOAT, callee="chosen"),
    ]
    assert interpreter(program(nodes, ["result"], [yes, no])).run(x(*values))[0] == expected


def test_parameters_are_updated_in_the_order_of_the_program():
    nodes = [
        Node("before", "Load", ["main:w", "u"], FLOAT),
        Node("u", "Constant", [], value=None),
        Node("assigned", "AssignAdd", ["main:w", "x", "u"], FLOAT),
        Node("after", "Load", ["main:w", "u"], FLOAT),
        Node("both", "MakeTuple", ["before", "after"], (FLOAT, FLOAT)),
    ]
    ran = interpreter(program(nodes, ["both"], parameters=[("w", [1, 1])]), [("w", [1, 1])])
    before, after = ran.run(x(1, 2))
    np.testing.assert_array_equal(before, [1, 1])
    np.testing.assert_array_equal(after, [2, 3])
    np.testing.assert_array_equal(ran.run(x(1, 2))[1], [3, 5])  # it stays for the next step
    np.testing.assert_array_equal(ran.parameters["w"].value, [3, 5])


def test_an_operator_that_is_not_known_is_named_with_place_and_shapes():
    node = Node("n", "Frobnicate", ["x"], FLOAT, {"axis": 3}, scope="Default/layer", instance="frob-op7")
    with pytest.raises(
        SimulationError, match=r"Frobnicate is not known \(Default/layer frob-op7; inputs \(float32 \[2\]\).*axis"
    ):
        interpreter(program([node], ["n"])).run(x(1, 2))


def test_a_result_of_another_shape_than_compiled_is_an_error():
    node = Node("n", "Add", ["x", "x"], Spec((3,), "float32", 4), scope="Default")
    with pytest.raises(SimulationError, match=r"Add gives float32 \[2\], compiled was float32 \[3\]"):
        interpreter(program([node], ["n"])).run(x(1, 2))


def test_inputs_of_another_shape_than_compiled_are_an_error():
    with pytest.raises(SimulationError, match=r"input x is float32 \[3\], the program was compiled for float32 \[2\]"):
        interpreter(program([Node("n", "Add", ["x", "x"], FLOAT)], ["n"])).run(x(1, 2, 3))


@pytest.mark.parametrize("given, words", [([], "no value for parameter w"), ([("w", [1, 2, 3])], r"w is \[3\]")])
def test_parameters_that_are_missing_or_misshapen(given, words):
    compiled = program([Node("n", "Add", ["x", "main:w"], FLOAT)], ["n"], parameters=[("w", [1, 1])])
    with pytest.raises(SimulationError, match=words):
        interpreter(compiled, given)


def test_the_first_value_that_is_not_finite_is_told_once_a_step():
    nodes = [
        constant("zero", [0, 1]),
        Node("quotient", "Div", ["x", "zero"], FLOAT, scope="Default/a"),
        Node("more", "Add", ["quotient", "x"], FLOAT, scope="Default/b"),
    ]
    ran = interpreter(program(nodes, ["more"]))
    ran.run(x(1, 1))
    ran.run(x(1, 1))
    assert [(event.step, event.place) for event in ran.non_finite] == [(0, "Div (Default/a)"), (1, "Div (Default/a)")]
    assert ran.status.overflow


def test_values_that_come_in_not_finite_are_nobodys_fault():
    ran = interpreter(program([Node("n", "Add", ["x", "x"], FLOAT)], ["n"]))
    ran.run(x(np.inf, 1))
    assert not ran.non_finite


def test_bfloat16_results_are_rounded():
    spec = Spec((2,), "bfloat16", 2)
    node = Node("n", "Add", ["x", "x"], spec)
    result = interpreter(program([node], ["n"], spec=spec)).run(x(1.001, 257.3))
    np.testing.assert_array_equal(result, round_bfloat16(np.array([2.002, 514.6], np.float32)))


@pytest.mark.parametrize(
    "value, expected",
    [(1.00390625, 1.0), (1.01171875, 1.015625), (np.inf, np.inf), (-2.5, -2.5), (3.3961775e38, np.inf)],
)
def test_rounding_to_bfloat16_is_to_nearest_even(value, expected):
    assert round_bfloat16(np.array([value], np.float32))[0] == np.float32(expected)


def test_nan_stays_nan_in_bfloat16():
    assert np.isnan(round_bfloat16(np.array([np.nan], np.float32))[0])


def test_a_watch_sees_every_operator():
    seen = []
    nodes = [Node("n", "Add", ["x", "x"], FLOAT), Node("m", "Mul", ["n", "x"], FLOAT)]
    interpreter(program(nodes, ["m"]), watch=lambda rank, step, node, value: seen.append((rank, step, node.op))).run(
        x(1, 2)
    )
    assert seen == [(0, 0, "Add"), (0, 0, "Mul")]


def test_the_error_of_the_rank_that_failed_is_raised_not_that_of_those_who_waited():
    good = program([Node("n", "AllReduce", ["x"], FLOAT, {"group": "g", "group_rank_ids": (0, 1), "op": "sum"})], ["n"])
    bad = program([Node("n", "Frobnicate", ["x"], FLOAT)], ["n"])
    network = Network(2)
    interpreters = [RankInterpreter(good, 0, network, {}), RankInterpreter(bad, 1, network, {})]
    with pytest.raises(SimulationError, match="Frobnicate"):
        run_ranks(interpreters, network, [[x(1, 2), x(1, 2)]])

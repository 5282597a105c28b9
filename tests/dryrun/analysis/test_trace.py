"""Buffers' lives and in-place updates in traced programs, hand-made and compiled."""

from mindformers_glm32k.dryrun.analysis.cost import measure
from mindformers_glm32k.dryrun.analysis.mindir import Graph, Node, Program, Spec, read_program
from mindformers_glm32k.dryrun.analysis.trace import trace_program


def tensor(elements, **more):
    return Spec((elements,), "float32", 4, **more)


def program(nodes, outputs, graphs=()):
    return Program(
        Graph("main", ["x"], nodes, outputs),
        {graph.name: graph for graph in graphs},
        {"w": ("transformer.w", tensor(10))},
        {"x": tensor(100)},
    )


def test_a_buffer_lives_from_its_making_to_its_last_use_through_views():
    nodes = [
        Node("a", "Exp", ["x"], tensor(100)),
        Node("view", "Reshape", ["a"], Spec((10, 10), "float32", 4)),
        Node("b", "Sum", ["x"], tensor(1)),
        Node("c", "Exp", ["view"], tensor(100)),
        Node("d", "Sum", ["c"], tensor(1)),
    ]
    memory = measure(trace_program(program(nodes, ["d"])))
    assert memory.curve == [400, 404, 800, 404]  # b is used by nobody and gone at once; a is kept by its view
    assert memory.activation_peak == 800 and memory.peak_event.node.name == "c"


def test_an_update_in_place_needs_no_memory():
    nodes = [Node("new", "AssignAdd", ["w", "x"], tensor(10, parameter="transformer.w"))]
    assert measure(trace_program(program(nodes, ["new"]))).activation_peak == 0


def test_what_selective_recompute_copies_is_recomputed():
    marks = {"unique_id": "7", "need_cse_after_recompute": 1}
    nodes = [
        Node("a", "Exp", ["x"], tensor(100), marks=marks),
        Node("b", "Exp", ["x"], tensor(100), marks=marks),
        Node("c", "Exp", ["x"], tensor(100), marks={"unique_id": "7"}),
        Node("d", "Exp", ["x"], tensor(100), marks={**marks, "micro": 1}),
    ]
    assert [event.part for event in trace_program(program(nodes, ["b"])).events] == [
        "forward",
        "recompute",
        "forward",
        "forward",
    ]


def test_a_closure_keeps_what_it_holds_until_it_is_called():
    backward = Graph("backward", ["saved", "dout"], [Node("dx", "Mul", ["saved", "dout"], tensor(100))], ["dx"])
    nodes = [
        Node("saved_1", "Exp", ["x"], tensor(100)),
        Node("function", "Constant", [], value="backward", callee="backward"),
        Node("bprop", "Partial", ["function", "saved_1"]),
        Node("loss", "Sum", ["x"], tensor(1)),
        Node("grad", "call", ["loss"], tensor(100), callee="bprop"),
    ]
    trace = trace_program(program(nodes, ["grad"], [backward]))
    assert not trace.unresolved
    assert measure(trace).curve == [400, 404, 804]


def test_a_constant_is_counted_once_however_often_it_is_used():
    nodes = [
        Node("k1", "Constant", [], value=tensor(50), data=b"k" * 200),
        Node("k2", "Constant", [], value=tensor(50), data=b"k" * 200),
        Node("y", "Add", ["k1", "k2"], tensor(50)),
    ]
    memory = measure(trace_program(program(nodes, ["y"])))
    assert memory.constants == 200 and memory.activation_peak == 200


def test_micro_batches_in_flight_follow_the_schedule(pipeline):
    """1F1B on two stages: the first keeps two micro batches, the last one."""
    for rank, in_flight in ((0, 2), (2, 1)):
        trace = trace_program(read_program(pipeline / "programs" / f"rank_{rank}.mindir"))
        flash = [event for event in trace.events if event.node.op.startswith("FlashAttentionScore")]
        waiting, most = 0, 0
        for event in flash:
            if event.node.op == "FlashAttentionScoreGrad":
                waiting -= 1
            elif event.part == "forward":
                waiting += 1
            most = max(most, waiting)
        assert (waiting, most) == (0, in_flight)

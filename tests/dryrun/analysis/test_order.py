"""Execution orders of small hand-made programs, and the memory that each order takes."""

import itertools
import random

import pytest

from mindformers_glm32k.dryrun.analysis.mindir import Graph, Node, Program, Spec
from mindformers_glm32k.dryrun.analysis.order import (
    alive_at,
    by_order,
    execution_order,
    frugal_order,
    live_bytes,
    ordered_events,
    peaks,
)
from mindformers_glm32k.dryrun.analysis.trace import trace_program


def tensor(elements):
    return Spec((elements,), "uint8", 1)


def traced(nodes, outputs, graphs=()):
    main = Graph("main", ["x"], nodes, outputs)
    return trace_program(
        Program(main, {graph.name: graph for graph in graphs}, {"w": ("transformer.w", tensor(1))}, {"x": tensor(1)})
    )


def names(trace, how):
    return [trace.steps[index].node.name for index in execution_order(trace.steps, trace.result, how)]


TWO_BRANCHES = [
    Node("a", "Exp", ["x"], tensor(1)),
    Node("left1", "Exp", ["a"], tensor(8)),
    Node("right1", "Exp", ["a"], tensor(8)),
    Node("left2", "Sum", ["left1"], tensor(1)),
    Node("right2", "Sum", ["right1"], tensor(1)),
    Node("both", "Add", ["left2", "right2"], tensor(1)),
]


def test_bfs_goes_level_by_level_and_dfs_finishes_a_branch():
    wide = [
        Node("a", "Exp", ["x"], tensor(1)),
        *(Node(f"{side}1", "Exp", ["a"], tensor(8)) for side in ("left", "right")),
        *(Node(f"{side}{part}", "Sum", [f"{side}1"], tensor(1)) for side in ("left", "right") for part in (2, 3)),
        Node("all", "AddN", ["left2", "left3", "right2", "right3"], tensor(1)),
    ]
    trace = traced(wide, ["all"])
    assert names(trace, "bfs") == ["a", "left1", "right1", "left2", "left3", "right2", "right3", "all"]
    assert names(trace, "dfs") == ["a", "left1", "left2", "left3", "right1", "right2", "right3", "all"]
    assert max(live_bytes(trace, ordered_events(trace, "bfs"))) > max(live_bytes(trace, ordered_events(trace, "dfs")))


def test_an_only_user_runs_at_once_in_bfs_too():
    trace = traced(TWO_BRANCHES, ["both"])
    assert names(trace, "bfs") == ["a", "left1", "left2", "right1", "right2", "both"]
    assert peaks(trace) == {"file": 17, "bfs": 10, "dfs": 10, "best": 10}


def test_what_is_alive_at_the_peak_makes_up_the_peak():
    trace = traced(TWO_BRANCHES, ["both"])
    for how, events in by_order(trace).items():
        curve = live_bytes(trace, events)
        alive = alive_at(trace, events, curve.index(max(curve)))
        assert sum(buffer.spec.bytes for buffer in alive) == peaks(trace)[how] == 10
        assert [buffer.event.node.name for buffer in alive] == ["a", "left1", "left2"]


def test_a_gather_of_weights_waits_for_the_layer_before():
    nodes = [
        *(Node(f"gather{layer}", "AllGather", ["w"], tensor(8)) for layer in range(3)),
        Node("y0", "MatMul", ["x", "gather0"], tensor(1)),
        Node("y1", "MatMul", ["y0", "gather1"], tensor(1)),
        Node("y2", "MatMul", ["y1", "gather2"], tensor(1)),
    ]
    trace = traced(nodes, ["y2"])
    for how in ("bfs", "dfs"):
        order = names(trace, how)
        assert order.index("gather2") > order.index("gather1") > order.index("gather0")
        assert order.index("gather2") > order.index("y0")
    assert peaks(trace)["file"] == 25 and peaks(trace)["bfs"] < 25


def test_users_of_a_communication_run_after_what_else_is_ready():
    nodes = [
        Node("a", "Exp", ["x"], tensor(1)),
        Node("sum", "AllReduce", ["a"], tensor(1), {"group": "g"}),
        Node("after", "Exp", ["sum"], tensor(1)),
        Node("other", "Exp", ["a"], tensor(1)),
        Node("more", "Exp", ["other"], tensor(1)),
        Node("end", "Add", ["after", "more"], tensor(1)),
    ]
    trace = traced(nodes, ["end"])
    assert names(trace, "bfs") == ["a", "sum", "other", "more", "after", "end"]
    assert names(trace, "dfs") == ["a", "sum", "after", "other", "more", "end"]


def test_users_of_a_fused_communication_wait_for_the_next_of_its_group():
    def reduced(number):
        return [
            Node(f"grad{number}", "Exp", ["a"], tensor(1)),
            Node(f"sum{number}", "AllReduce", [f"grad{number}"], tensor(1), {"group": "g", "fusion": 1}),
            Node(f"step{number}", "Exp", [f"sum{number}"], tensor(1)),
        ]

    nodes = [
        Node("a", "Exp", ["x"], tensor(1)),
        *reduced(1),
        *reduced(2),
        Node("end", "Add", ["step1", "step2"], tensor(1)),
    ]
    assert names(traced(nodes, ["end"]), "bfs") == ["a", "grad1", "sum1", "grad2", "sum2", "step1", "step2", "end"]


def test_a_depend_orders_kernels_and_is_none():
    nodes = [
        Node("first", "Exp", ["x"], tensor(8)),
        Node("small", "Sum", ["first"], tensor(1)),
        Node("held", "Depend", ["x", "small"], tensor(1)),
        Node("second", "Exp", ["held"], tensor(8)),
        Node("end", "Add", ["small", "second"], tensor(1)),
    ]
    trace = traced(nodes, ["end"])
    assert names(trace, "bfs") == names(trace, "dfs") == ["first", "small", "second", "end"]


def test_calls_and_closures_are_inlined_and_what_nobody_needs_is_left_out():
    backward = Graph("backward", ["saved", "d"], [Node("b", "Mul", ["saved", "d"], tensor(1))], ["b"])
    nodes = [
        Node("f", "Exp", ["x"], tensor(1)),
        Node("function", "Constant", [], callee="backward"),
        Node("bound", "Partial", ["function", "f"]),
        Node("unused", "Exp", ["f"], tensor(1)),
        Node("d", "Sum", ["x"], tensor(1)),
        Node("grad", "call", ["d"], tensor(1), callee="bound"),
        Node("end", "Exp", ["grad"], tensor(1)),
    ]
    trace = traced(nodes, ["end"], [backward])
    assert not trace.unresolved
    for how in ("bfs", "dfs"):
        order = names(trace, how)
        assert sorted(order) == ["b", "d", "end", "f"] and order.index("b") > order.index("f")


@pytest.mark.parametrize("patient", (False, True))
@pytest.mark.parametrize("seed", range(20))
def test_every_order_respects_every_edge(seed, patient):
    random.seed(seed)
    nodes = []
    for number in range(40):
        before = [node.name for node in nodes] or ["x"]
        sources = random.sample(before, min(len(before), random.choice((1, 1, 2, 3))))
        operator = random.choice(("Exp", "Exp", "Add", "AllReduce", "AllGather", "Depend"))
        nodes.append(Node(f"n{number}", operator, sources, tensor(random.randint(1, 9))))
    trace = traced(nodes, [nodes[-1].name])
    events = [ordered_events(trace, "bfs"), ordered_events(trace, "dfs"), frugal_order(trace, patient)]
    assert len({frozenset(event.index for event in order) for order in events}) == 1
    for order in events:
        place = {event.index: position for position, event in enumerate(order)}
        assert len(place) == len(order) > 0
        for event in order:
            for buffer in event.reads:
                made = buffer.storage.event
                assert made is None or place[made.index] < place[event.index]


def test_the_best_known_order_is_near_the_best_of_all():
    trace = traced(
        [
            Node("a", "Exp", ["x"], tensor(5)),
            Node("b", "Exp", ["x"], tensor(9)),
            Node("a1", "Sum", ["a"], tensor(1)),
            Node("b1", "Sum", ["b"], tensor(1)),
            Node("c", "Exp", ["x"], tensor(7)),
            Node("c1", "Sum", ["c"], tensor(1)),
            Node("end", "AddN", ["a1", "b1", "c1"], tensor(1)),
        ],
        ["end"],
    )
    possible = []
    for order in itertools.permutations(trace.events):
        place = {event.index: position for position, event in enumerate(order)}
        if all(
            buffer.storage.event is None or place[buffer.storage.event.index] < place[event.index]
            for event in order
            for buffer in event.reads
        ):
            possible.append(max(live_bytes(trace, order)))
    assert min(possible) <= peaks(trace)["best"] <= min(possible) + 2

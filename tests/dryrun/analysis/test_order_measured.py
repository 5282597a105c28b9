"""The orders and the memory of them, against what MindSpore reports of graphs that it compiles and runs on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dryrun.tiny import ROOT
from mindformers_glm32k.dryrun.analysis.mindir import Graph, Node, Program, Spec, read_program
from mindformers_glm32k.dryrun.analysis.order import execution_order, live_bytes, ordered_events
from mindformers_glm32k.dryrun.analysis.trace import trace_program
from mindformers_glm32k.protobuf import message_class

MIB = 1024**2
# Training steps of 41 to 574 kernels. Kernels of the chunks run in no order at all on the CPU: see `run_order`.
RUNS = [("layers", "bfs", 2), ("layers", "dfs", 8), ("chunks", "bfs", 2), ("chunks", "dfs", 8)]
LONG = [pytest.param(run, marks=pytest.mark.slow) for run in RUNS[1:]]


def reported(folder):
    """MindSpore's order of the kernels, and the graph of its backend that was put in order, as a trace."""
    (listed,) = folder.rglob("ms_execution_order_graph_*.csv")
    (graph,) = folder.rglob("ms_output_trace_code_graph_*.pb")
    model = message_class("anf_ir_pb2", "ModelProto")()
    model.ParseFromString(graph.read_bytes())
    constants = {constant.key: constant.value.int_val for constant in model.graph.const_vals}
    items = {}  # (node, index) -> what it holds: the types of tuples have no shapes
    for node in model.graph.node:
        if node.op_type == "TupleGetItem":
            items[node.input[0].name, constants[node.input[1].name]] = tensor_of(node.output_type)
    nodes = [Node(name, "Constant", [], value=value) for name, value in constants.items()]
    for node in model.graph.node:
        output = tensor_of(node.output_type)
        if node.output_type.HasField("sequence_type"):
            count = len(node.output_type.sequence_type.elem_types)
            output = tuple(items.get((node.name, index)) for index in range(count))
        nodes.append(Node(node.name, node.op_type, [each.name for each in node.input], output, scope=node.full_name))
    inputs = {parameter.name: tensor_of(parameter.type) for parameter in model.graph.parameters}
    main = Graph("main", list(inputs), nodes, [output.name for output in model.graph.outputs])
    return listed.read_text().split()[1:], trace_program(Program(main, {}, {}, inputs))


def tensor_of(kind):
    """The tensor of a node's type; all of these nets' activations have four bytes an element."""
    if not kind.HasField("tensor_type"):
        return None
    return Spec(tuple(dimension.size for dimension in kind.tensor_type.shape.dim), "float32", 4)


def run_order(folder, trace):
    """The events of a trace in the order in which the CPU started them, by MindSpore's memory tracker."""
    with open(folder / "tracker" / "task.csv", encoding="utf-8") as file:
        started = [line.split(",")[1].partition("_")[2] for line in file]
    place = {name: index for index, name in reversed(list(enumerate(started)))}
    ran = [event for event in trace.events if event.node.scope in place]
    return sorted(ran, key=lambda event: place[event.node.scope])


@pytest.fixture(scope="module", params=[RUNS[0], *LONG], ids=lambda run: "-".join(map(str, run)))
def run(request, tmp_path_factory):
    """(net, order, folder, bytes that the memory pool held at its peak) of a step."""
    folder = tmp_path_factory.mktemp("ordered")
    net, order, size = request.param
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ordered.py")), net, order, str(size)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    peak = re.search(r"actual peak used mem:(\d+)M", result.stdout)
    assert peak, result.stdout[-2000:]
    return net, order, folder, int(peak.group(1)) * MIB


def test_the_order_is_mindspore_s_own(run):
    _, order, folder, _ = run
    names, backend = reported(folder)
    assert not backend.unresolved
    ours = [backend.steps[index].node.scope for index in execution_order(backend.steps, backend.result, order)]
    assert len(names) > 40 and ours == names
    other = "bfs" if order == "dfs" else "dfs"
    assert [backend.steps[index].node.scope for index in execution_order(backend.steps, backend.result, other)] != names


def test_the_memory_of_an_order_is_what_the_run_needed(run):
    """Chunks by the order in which the CPU started the kernels: its threads take whatever is ready. Layers follow on
    each other, so that bfs, dfs and the threads come to the same."""
    net, order, folder, peak = run
    _, backend = reported(folder)
    fixed = sum(buffer.spec.bytes for buffer in backend.inputs)
    events = ordered_events(backend, order)
    if net == "chunks":
        ran = run_order(folder, backend)
        left_out = {event.index for event in events} - {event.index for event in ran}
        lost = sum(buffer.spec.bytes for event in events if event.index in left_out for buffer in event.writes)
        assert lost < 0.02 * peak  # sums of weight gradients and the optimizer, which the tracker names otherwise
        events = ran
    needed = max(live_bytes(backend, events)) + fixed
    assert abs(needed - peak) <= 0.1 * peak, (needed / MIB, peak / MIB)


def test_the_program_that_the_dry_run_reads_needs_what_its_layers_needed(run):
    net, order, folder, peak = run
    if net != "layers":
        pytest.skip("chunks run in no order on the CPU")
    trace = trace_program(read_program(folder / "program.mindir"))
    fixed = sum(buffer.spec.bytes for buffer in trace.parameters + trace.inputs)
    needed = max(live_bytes(trace, ordered_events(trace, order))) + fixed
    assert abs(needed - peak) <= 0.1 * peak, (needed / MIB, peak / MIB)

"""Walks a program as an NPU would run it and lists what happens: operations with the buffers they read and write.

Nothing is computed; a value is only the memory it takes. Calls, closures (the backward of a micro batch is a closure
that its forward returns) and tuples are followed, so that a buffer's lifetime is known over the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mindformers_glm32k.dryrun.analysis.mindir import Graph, Node, Program, Spec

_RESHAPING = frozenset(("Reshape", "ExpandDims", "Squeeze"))
_PASSING_ON = ("FlattenGrad", "Depend", "Load", "StopGradient", "Identity", "InsertGradientOf", "Return", "return")
# Operations whose result is the memory of their first input: Ascend's runtime skips them.
VIEWS = _RESHAPING | frozenset(_PASSING_ON)
_TUPLES = frozenset(("MakeTuple", "MakeList", "make_tuple"))


class Buffer:
    """A region of device memory.

    Args:
        spec: the tensor in it, as the reader sees it.
        kind: "activation", "parameter", "input" or "constant".
        name: parameter's or input's name.
        storage: the buffer whose memory it shares; None: its own.

    Attributes:
        made, last: index of the event that writes it, and of the last one that reads it or a view of it.
    """

    __slots__ = ("spec", "kind", "name", "storage", "made", "last", "event")

    def __init__(self, spec: Spec, kind: str, name: str = "", storage: Buffer | None = None):
        self.spec, self.kind, self.name = spec, kind, name
        self.storage = storage or self
        self.made = self.last = -1
        self.event = None


@dataclass
class Closure:
    """A function with its first arguments bound; `sources`: the steps that compute these arguments."""

    graph: Graph
    bound: tuple = ()
    sources: tuple = ()


@dataclass
class Literal:
    """A constant other than a tensor."""

    value: object


@dataclass
class Event:
    """One operation as it is run.

    Args:
        index: position in time.
        node: the operation.
        reads, writes: operands and results, views included among the operands.
        arguments: the operands as values: Buffer, Literal, tuple, Closure or None.
        again: a copy of an earlier node by selective recompute, which sets no mark (full recompute does).
    """

    index: int
    node: Node
    reads: list[Buffer]
    writes: list[Buffer]
    arguments: list
    again: bool = False

    @property
    def part(self) -> str:
        """ "recompute", "backward" or "forward"."""
        if self.node.marks.get("duplicated") or self.again:
            return "recompute"
        return "backward" if self.node.scope.startswith("Gradients") else "forward"


@dataclass
class Step:
    """A node of the walk, with calls inlined; virtual nodes and views are steps, too.

    Args:
        node: the operation.
        sources: the steps that compute its operands; None: a parameter, an input or a constant.
        event: None for virtual nodes and views.
    """

    node: Node
    sources: list[int | None]
    event: Event | None = None


@dataclass
class Trace:
    """What happens in one step on one device.

    Args:
        events: in the order of the program's file; the module `order` computes the others.
        parameters: weights, optimizer states, ….
        inputs: the step's data.
        constants: each distinct constant tensor once.
        activations: everything that operations write.
        unresolved: constructs that could not be followed; empty when the trace is complete.
        steps: all nodes in the file's order, and what each one waits for.
        result: the step that returns.
        results: buffers that the program returns.
    """

    events: list[Event] = field(default_factory=list)
    parameters: list[Buffer] = field(default_factory=list)
    inputs: list[Buffer] = field(default_factory=list)
    constants: list[Buffer] = field(default_factory=list)
    activations: list[Buffer] = field(default_factory=list)
    unresolved: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    result: int = -1
    results: list[Buffer] = field(default_factory=list)


def trace_program(program: Program) -> Trace:
    """Follows a program from its start to its end."""
    walker = _Walker(program)
    result, source = walker.run(program.main, walker.globals, {})
    trace = walker.trace
    trace.steps.append(Step(Node("return", "Return", []), [source]))
    trace.result, trace.results = len(trace.steps) - 1, list(buffers_in(result))
    for buffer in trace.results:  # the step's results live to its end
        buffer.storage.last = len(trace.events)
    return trace


def buffers_in(value: object) -> Iterator[Buffer]:
    """All buffers of a value (Buffer, Closure, tuple or anything else), at any depth."""
    if isinstance(value, Buffer):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from buffers_in(item)
    elif isinstance(value, Closure):
        yield from buffers_in(value.bound)


class _Walker:
    def __init__(self, program):
        self.program = program
        self.trace = Trace()
        self.globals = {}
        self.by_parameter = {}
        self.active = []
        self.originals = {}  # (unique id, micro batch) -> name of the first node that has them
        for name, (parameter, spec) in program.parameters.items():
            self.globals[name] = self.by_parameter[parameter] = Buffer(spec, "parameter", parameter)
            self.trace.parameters.append(self.globals[name])
        for name, spec in program.inputs.items():
            self.globals[name] = Buffer(spec, "input", name.rsplit(":", 1)[-1])
            self.trace.inputs.append(self.globals[name])
        # constants are visible everywhere, whichever graph's node list they stand in
        self.constants = {}
        known = {}
        for graph in (program.main, *program.graphs.values()):
            for node in graph.nodes:
                if node.op == "Constant":
                    self.constants[node.name] = self._constant(node, known)

    def _constant(self, node, known):
        if node.callee:
            return Closure(self.program.graphs[node.callee])
        if not isinstance(node.value, Spec):
            return Literal(node.value)
        key = (node.data[:4096], len(node.data), node.value)
        if key not in known:
            known[key] = Buffer(node.value, "constant", node.name)
            self.trace.constants.append(known[key])
        return known[key]

    def run(self, graph, values, sources):
        """Runs a graph whose inputs are in `values` (name -> value) and come from the steps in `sources` (name ->
        index); returns its output and the step that makes it."""
        if graph.name in self.active:
            self._note_unresolved(f"a loop through {graph.name[-60:]} is counted once")
            return None, None
        self.active.append(graph.name)
        for node in graph.nodes:
            if node.op != "Constant":
                values[node.name], sources[node.name] = self._step(node, values, sources)
        self.active.pop()
        results = tuple(self._value(name, values) for name in graph.outputs)
        made_by = [sources.get(name) for name in graph.outputs]
        if len(results) == 1:
            return results[0], made_by[0]
        self.trace.steps.append(Step(Node(graph.name, "MakeTuple", graph.outputs), made_by))
        return results, len(self.trace.steps) - 1

    def _value(self, name, values):
        for table in (values, self.globals, self.constants):
            if name in table:
                return table[name]
        graph = self.program.graphs.get(name[5:] if name.startswith("REF::") else name)
        if graph is not None:
            return Closure(graph)
        self._note_unresolved(f"no value for {name[-60:]}")
        return None

    def _call(self, closure, arguments, sources):
        graph = closure.graph
        arguments, sources = [*closure.bound, *arguments], [*closure.sources, *sources]
        if len(arguments) != len(graph.inputs):
            self._note_unresolved(f"{graph.name[-60:]} takes {len(graph.inputs)} values, got {len(arguments)}")
        return self.run(graph, dict(zip(graph.inputs, arguments)), dict(zip(graph.inputs, sources)))

    def _step(self, node, values, sources):
        """A node's value and the step that makes it."""
        arguments = [self._value(name, values) for name in node.inputs]
        made_by = [sources.get(name) for name in node.inputs]
        callee = self._value(node.callee, values) if node.op == "call" else None
        if isinstance(callee, Closure):
            return self._call(callee, arguments, made_by)
        events = len(self.trace.events)
        if node.op == "Partial":
            first = arguments[0]
            value = Closure(first.graph, (*first.bound, *arguments[1:]), (*first.sources, *made_by[1:]))
        else:
            value = self._node(node, arguments)
        self.trace.steps.append(Step(node, made_by, self.trace.events[-1] if len(self.trace.events) > events else None))
        return value, len(self.trace.steps) - 1

    def _node(self, node, arguments):
        if node.op == "call":
            self._note_unresolved(f"call of {node.callee[-60:]}, which is no function")
            return self._fresh(node, arguments)
        if node.op == "TupleGetItem":
            return self._item(node, arguments)
        if node.op in _TUPLES:
            return tuple(arguments)
        if node.op in ("Switch", "switch"):
            return self._branch(node, arguments)
        if node.op == "UpdateState":
            return None
        if node.op in VIEWS:
            return self._view(node, arguments[0])
        return self._fresh(node, arguments)

    def _item(self, node, arguments):
        whole, index = arguments
        index = index.value if isinstance(index, Literal) else None
        if isinstance(whole, tuple) and isinstance(index, int) and index < len(whole):
            return whole[index]
        if not isinstance(whole, Buffer):
            self._note_unresolved(f"item {index} of a {type(whole).__name__} in {node.scope[-60:]}")
        return whole if isinstance(whole, Buffer) else None

    def _branch(self, node, arguments):
        """The longer branch: the optimizer's update, not its skip after an overflow."""
        self._event(node, arguments[:1], [])
        return max(arguments[1:3], key=lambda value: len(value.graph.nodes) if isinstance(value, Closure) else -1)

    def _view(self, node, source):
        if node.op in _RESHAPING and isinstance(source, Buffer) and isinstance(node.output, Spec):
            return Buffer(node.output, source.kind, source.name, source.storage)
        return source

    def _fresh(self, node, arguments):
        """New memory for what the operation writes, except for updates of parameters in place."""
        written = []

        def make(spec):
            if spec is None:
                return None
            if isinstance(spec, tuple):
                return tuple(make(item) for item in spec)
            if spec.parameter in self.by_parameter:
                return self.by_parameter[spec.parameter]
            written.append(Buffer(spec, "activation"))
            return written[-1]

        value = make(node.output)
        self._event(node, arguments, written)
        return value

    def _is_copy(self, node):
        """Whether a node is selective recompute's copy of an earlier node."""
        if "need_cse_after_recompute" not in node.marks or node.scope.startswith("Gradients"):
            return False
        key = (node.marks.get("unique_id"), node.marks.get("micro"))
        return self.originals.setdefault(key, node.name) != node.name

    def _event(self, node, arguments, written):
        index = len(self.trace.events)
        reads = [buffer for argument in arguments for buffer in buffers_in(argument)]
        event = Event(index, node, reads, written, arguments, self._is_copy(node))
        for buffer in reads:
            buffer.storage.last = index
        for buffer in written:
            buffer.made = buffer.last = index
            buffer.event = event
        self.trace.activations += written
        self.trace.events.append(event)

    def _note_unresolved(self, text):
        if text not in self.trace.unresolved:
            self.trace.unresolved.append(text)

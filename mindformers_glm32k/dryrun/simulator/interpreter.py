"""Walks a compiled program: nodes in the order of the file, which respects every data and side-effect edge.

What a primitive computes is in `operators`; this module moves values: calls, closures, tuples, parameters.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Graph, Program, Spec
from mindformers_glm32k.dryrun.simulator import operators
from mindformers_glm32k.dryrun.simulator.network import Network, NetworkError, PeerFailed
from mindformers_glm32k.dryrun.simulator.operators import NUMPY, Array, Parameter, from_bytes, plain, round_bfloat16

_NARROW = ("float16", "bfloat16")


class SimulationError(RuntimeError):
    """A program cannot be simulated. The message names rank, operator, location and shapes."""


@dataclass
class Status:
    """The overflow register of a device: set when an operator makes something not finite of finite inputs."""

    overflow: bool = False


@dataclass
class NonFinite:
    """The first NaN or infinity of a rank in a step: the operator and its location (`place`, as in execution.json), its
    output, and when (seconds, to tell which rank came first)."""

    rank: int
    step: int
    place: str
    output: str
    when: float


@dataclass(frozen=True)
class _Closure:
    """A graph with its first inputs bound."""

    graph: Graph
    arguments: tuple = ()


class RankInterpreter:
    """Runs the program of one rank.

    Args:
        parameters: arrays by parameter name, for each parameter of the program. A Parameter instead of an array is
            shared with another interpreter of this rank, whose program uses the same memory.
        watch: gets (rank, step, node, value) after every operator, for tracing.

    Raises:
        SimulationError: a parameter is missing or has another shape.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        network: Network,
        parameters: Mapping[str, Any],
        watch: Callable | None = None,
    ):
        self.program, self.rank, self.network, self.watch = program, rank, network, watch
        self.table = operators.table()
        self.status = Status()
        self.step = 0
        self.non_finite = []  # at most one a step
        self.op_counts = Counter()  # how often each operator ran
        self.parameters = {}
        for name, spec in program.parameters.values():
            if name not in parameters:
                raise SimulationError(f"rank {rank}: no value for parameter {name} {list(spec.shape)}")
            given = parameters[name]
            value = np.asarray(plain(given), NUMPY[spec.dtype])
            if value.shape != spec.shape:
                raise SimulationError(
                    f"rank {rank}: parameter {name} is {list(value.shape)}, the program holds {list(spec.shape)}"
                )
            self.parameters[name] = given if isinstance(given, Parameter) else Parameter(name, value, spec.dtype)
        self.instructions = {}  # graph -> (constants by name, [(node, names that are not needed after it)])
        self.constants = {
            node.name: _Closure(program.graphs[node.callee]) if node.callee else _constant(node)
            for graph in (program.main, *program.graphs.values())
            for node in graph.nodes
            if node.op == "Constant"
        }

    def run(self, inputs: list[Array]) -> Any:
        """Runs one step on inputs in the order of the program's; the result is an array, or a (nested) tuple.

        Raises:
            SimulationError: an operator is not in the table, fails, or gives another shape or dtype than compiled.
            NetworkError, PeerFailed: see `Network`.
        """
        main = self.program.main
        if len(inputs) != len(main.inputs):
            raise SimulationError(f"rank {self.rank}: {len(inputs)} inputs for a program that has {len(main.inputs)}")
        for name, value in zip(main.inputs, inputs):
            spec = self.program.inputs[name]
            if value.shape != spec.shape or value.dtype != NUMPY[spec.dtype]:
                raise SimulationError(
                    f"rank {self.rank}: input {name.rsplit(':', 1)[-1]} is {value.dtype} "
                    f"{list(value.shape)}, the program was compiled for {spec.dtype} {list(spec.shape)}"
                )
        environment = {name: self.parameters[parameter] for name, (parameter, _) in self.program.parameters.items()}
        result = plain(self._call(main, inputs, environment))
        self.step += 1
        return result

    def _call(self, graph, arguments, environment=None):
        constants, code = self.instructions.get(graph.name) or self._prepare(graph)
        values = dict(environment or ())
        values.update(zip(graph.inputs, arguments))
        values.update(constants)
        for node, unneeded in code:
            values[node.name] = self._node(node, values)
            for name in unneeded:
                del values[name]
        results = tuple(self._value(name, values) for name in graph.outputs)
        return results[0] if len(results) == 1 else results

    def _prepare(self, graph):
        nodes = [node for node in graph.nodes if node.op != "Constant"]
        constants = {node.name: self.constants[node.name] for node in graph.nodes if node.op == "Constant"}
        own, kept, code = {node.name for node in nodes}, set(graph.outputs), []
        for node in reversed(nodes):
            used = {name for name in (*node.inputs, node.callee) if name in own and name not in kept}
            kept |= used
            unneeded = tuple(used) + (() if node.name in kept else (node.name,))
            code.append((node, unneeded))
        self.instructions[graph.name] = constants, code[::-1]
        return self.instructions[graph.name]

    def _value(self, name, values):
        if name in values:
            return values[name]
        name = name[5:] if name.startswith("REF::") else name
        if name in self.program.graphs:
            return _Closure(self.program.graphs[name])
        if name in self.constants:
            return self.constants[name]
        raise SimulationError(f"rank {self.rank}: {name} is used before it is computed")

    def _node(self, node, values):
        inputs = [self._value(name, values) for name in node.inputs]
        if node.op == "call":
            function = self._value(node.callee, values)
            return self._call(function.graph, [*function.arguments, *inputs])
        mover = _MOVERS.get(node.op)
        return mover(inputs) if mover else self._operator(node, inputs)

    def _operator(self, node, inputs):
        entry = self.table.get(node.op)
        if entry is None:
            raise SimulationError(
                f"rank {self.rank}: operator {node.op} is not known ({self._location(node)}; inputs "
                f"{_shapes(plain(tuple(inputs)))}, attributes {node.attributes})"
            )
        arguments = inputs if entry.in_place else [plain(value) for value in inputs]
        self.op_counts[node.op] += 1
        location = self._location(node)
        call = operators.Call(node.op, node.attributes, node.output, self.rank, self.network, location, self.status)
        try:
            with np.errstate(all="ignore"):  # `_look_for_non_finite` reports it
                result = entry.function(call, *arguments)
        except PeerFailed:
            raise
        except NetworkError as error:
            raise NetworkError(f"{error} (rank {self.rank} at {location})") from error
        except Exception as error:
            raise SimulationError(
                f"rank {self.rank}: {node.op} failed: {type(error).__name__}: {error} ({location}; "
                f"inputs {_shapes(plain(tuple(inputs)))}, attributes {node.attributes})"
            ) from error
        result = self._conform(node, result, node.output)
        self._look_for_non_finite(node, inputs, result)
        if self.watch:
            self.watch(self.rank, self.step, node, plain(result))
        return result

    def _conform(self, node, result, spec):
        """The result as compiled: rounded where it is bfloat16, an error where shape or dtype differ."""
        if isinstance(spec, tuple) and isinstance(result, tuple):
            if len(result) != len(spec):
                raise SimulationError(
                    f"rank {self.rank}: {node.op} gives {len(result)} results, compiled were {len(spec)} "
                    f"({self._location(node)})"
                )
            return tuple(self._conform(node, *pair) for pair in zip(result, spec))
        if not isinstance(spec, Spec) or not isinstance(result, (np.ndarray, np.generic)):
            return result
        result = np.asarray(result)
        known = all(size >= 0 for size in spec.shape)
        if result.dtype != NUMPY.get(spec.dtype) or (known and result.shape != spec.shape):
            raise SimulationError(
                f"rank {self.rank}: {node.op} gives {result.dtype} {list(result.shape)}, compiled was "
                f"{spec.dtype} {list(spec.shape)} ({self._location(node)})"
            )
        return round_bfloat16(result) if spec.dtype == "bfloat16" else result

    def _look_for_non_finite(self, node, inputs, result):
        if self.status.overflow and self.non_finite and self.non_finite[-1].step == self.step:
            return
        if node.op in _CARRIERS or _finite(plain(result)) or not _finite(plain(tuple(inputs))):
            return
        self.status.overflow = True
        if not self.non_finite or self.non_finite[-1].step != self.step:
            place, now = f"{node.op} ({self._location(node)})", time.monotonic()
            self.non_finite.append(NonFinite(self.rank, self.step, place, _shapes(plain(result)), now))

    @staticmethod
    def _location(node: Any) -> str:
        micro = node.marks.get("micro")
        return (
            f"{node.scope or node.name}{f' {node.instance}' if node.instance else ''}"
            f"{'' if micro is None else f', micro batch {micro}'}"
        )


def widen(program: Program) -> Program:
    """The program with float32 wherever it has float16 or bfloat16, constants and parameters included.

    The kernels of prediction (ApplyRotaryPosEmb, PagedAttention) take 16 bits only, and the compiler insists on it.
    Rounding hides small mistakes and makes greedy decoding choose another token now and then; widened, the same program
    with the same shards and collectives computes what it states to seven digits.
    """

    def graph(old):
        return Graph(old.name, old.inputs, [_widen_node(node) for node in old.nodes], old.outputs)

    return Program(
        graph(program.main),
        {name: graph(old) for name, old in program.graphs.items()},
        {node: (name, _widen_spec(spec)) for node, (name, spec) in program.parameters.items()},
        {name: _widen_spec(spec) for name, spec in program.inputs.items()},
    )


def _widen_node(node):
    data = node.data
    if isinstance(node.value, Spec) and node.value.dtype in _NARROW:
        data = from_bytes(data, node.value).astype(np.float32).tobytes()
    return replace(node, output=_widen_spec(node.output), value=_widen_spec(node.value), data=data)


def _widen_spec(value):
    if isinstance(value, tuple):
        return tuple(_widen_spec(item) for item in value)
    if isinstance(value, Spec) and value.dtype in _NARROW:
        return replace(value, dtype="float32", itemsize=4)
    return value


# pass on values of other ranks, which report what is not finite themselves
_CARRIERS = frozenset(("Receive", "AllGather", "AlltoAll", "AllToAll", "Broadcast"))
_MOVERS = {
    "Depend": lambda inputs: inputs[0],
    "Load": lambda inputs: plain(inputs[0]),
    "UpdateState": lambda inputs: None,
    "MakeTuple": tuple,
    "TupleGetItem": lambda inputs: inputs[0][int(inputs[1])],
    "RealTupleGetItem": lambda inputs: inputs[0][int(inputs[1])],
    "StopGradient": lambda inputs: inputs[0],
    "Partial": lambda inputs: _Closure(inputs[0].graph, (*inputs[0].arguments, *inputs[1:])),
    "Switch": lambda inputs: inputs[1] if bool(np.all(plain(inputs[0]))) else inputs[2],
}


def _constant(node):
    """An array for tensors, else the Python value in the file."""
    return from_bytes(node.data, node.value) if isinstance(node.value, Spec) else node.value


def _finite(value):
    if isinstance(value, tuple):
        return all(_finite(item) for item in value)
    return not isinstance(value, np.ndarray) or value.dtype.kind != "f" or bool(np.isfinite(value).all())


def _shapes(value):
    if isinstance(value, tuple):
        return "(" + ", ".join(_shapes(item) for item in value) + ")"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)

"""Walks a compiled program: nodes in the order of the file, which respects every data and side-effect edge.

What a primitive computes stands in `operators`; here is what moves values: calls, closures, tuples, parameters.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Spec
from mindformers_glm32k.dryrun.simulator import operators
from mindformers_glm32k.dryrun.simulator.network import NetworkError, PeerFailed
from mindformers_glm32k.dryrun.simulator.operators.values import (
    NUMPY,
    Closure,
    Parameter,
    constant,
    plain,
    round_bfloat16,
)


class ExecutionError(RuntimeError):
    """A program cannot be executed. The message names rank, operator, place and shapes."""


@dataclass
class Status:
    """The overflow register of a device: set when an operator makes something not finite of finite inputs."""

    overflow: bool = False


@dataclass
class NonFinite:
    """Where a value first was NaN or infinite in a step of a rank: the operator (with its place), what it made, and when (in
    seconds, to tell which rank came first)."""

    rank: int
    step: int
    place: str
    output: str
    when: float


@dataclass
class _Instructions:
    """A graph, prepared: constants by name, nodes with the names that are not needed after them."""

    constants: dict
    code: list = field(default_factory=list)


class Machine:
    """One rank: its program, its parameters, its place in the network.

    Args:
        program (Program): what is executed.
        rank (int): who.
        network (Network): where the other ranks are.
        parameters (dict[str, numpy.ndarray | Parameter]): values by parameter name; each parameter of the program must be
            there. A Parameter is shared: with another machine of this rank, whose program uses the same memory.
        watch (callable | None): gets (rank, step, node, value) after every operator, for tracing.

    Raises:
        ExecutionError: a parameter is missing or has another shape.
    """

    def __init__(self, program, rank, network, parameters, watch=None):
        self.program, self.rank, self.network, self.watch = program, rank, network, watch
        self.table = operators.table()
        self.status = Status()
        self.step = 0
        self.non_finite = []  # at most one a step
        self.executed = Counter()  # how often each operator ran
        self.parameters = {}
        for name, spec in program.parameters.values():
            if name not in parameters:
                raise ExecutionError(f"rank {rank}: no value for parameter {name} {list(spec.shape)}")
            given = parameters[name]
            value = np.asarray(plain(given), NUMPY[spec.dtype])
            if value.shape != spec.shape:
                raise ExecutionError(
                    f"rank {rank}: parameter {name} is {list(value.shape)}, the program holds {list(spec.shape)}"
                )
            self.parameters[name] = given if isinstance(given, Parameter) else Parameter(name, value, spec.dtype)
        self.instructions = {}
        self.constants = {
            node.name: Closure(program.graphs[node.callee]) if node.callee else constant(node)
            for graph in (program.main, *program.graphs.values())
            for node in graph.nodes
            if node.op == "Constant"
        }

    def run(self, inputs):
        """Executes one step.

        Args:
            inputs (list[numpy.ndarray]): in the order of the program's inputs.

        Returns:
            The program's result: an array, or a (nested) tuple.

        Raises:
            ExecutionError: an operator is not in the table, fails, or gives another shape or dtype than compiled.
            NetworkError, PeerFailed: see `Network`.
        """
        main = self.program.main
        if len(inputs) != len(main.inputs):
            raise ExecutionError(f"rank {self.rank}: {len(inputs)} inputs for a program that has {len(main.inputs)}")
        for name, value in zip(main.inputs, inputs):
            spec = self.program.inputs[name]
            if value.shape != spec.shape or value.dtype != NUMPY[spec.dtype]:
                raise ExecutionError(
                    f"rank {self.rank}: input {name.rsplit(':', 1)[-1]} is {value.dtype} "
                    f"{list(value.shape)}, the program was compiled for {spec.dtype} {list(spec.shape)}"
                )
        environment = {name: self.parameters[parameter] for name, (parameter, _) in self.program.parameters.items()}
        result = plain(self._call(main, inputs, environment))
        self.step += 1
        return result

    def _call(self, graph, arguments, environment=None):
        instructions = self.instructions.get(graph.name) or self._prepare(graph)
        values = dict(environment or ())
        values.update(zip(graph.inputs, arguments))
        values.update(instructions.constants)
        for node, unneeded in instructions.code:
            values[node.name] = self._node(node, values)
            for name in unneeded:
                del values[name]
        results = tuple(self._value(name, values) for name in graph.outputs)
        return results[0] if len(results) == 1 else results

    def _prepare(self, graph):
        nodes = [node for node in graph.nodes if node.op != "Constant"]
        instructions = _Instructions(
            {node.name: self.constants[node.name] for node in graph.nodes if node.op == "Constant"}
        )
        own = {node.name for node in nodes}
        kept = set(graph.outputs)
        for node in reversed(nodes):
            used = {name for name in (*node.inputs, node.callee) if name in own and name not in kept}
            kept |= used
            unneeded = tuple(used) + (() if node.name in kept else (node.name,))
            instructions.code.append((node, unneeded))
        instructions.code.reverse()
        self.instructions[graph.name] = instructions
        return instructions

    def _value(self, name, values):
        if name in values:
            return values[name]
        name = name[5:] if name.startswith("REF::") else name
        if name in self.program.graphs:
            return Closure(self.program.graphs[name])
        if name in self.constants:
            return self.constants[name]
        raise ExecutionError(f"rank {self.rank}: {name} is used before it is computed")

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
            raise ExecutionError(
                f"rank {self.rank}: operator {node.op} is not known ({self._place(node)}; inputs "
                f"{_shapes(plain(tuple(inputs)))}, attributes {node.attributes})"
            )
        arguments = inputs if entry.in_place else [plain(value) for value in inputs]
        self.executed[node.op] += 1
        call = operators.Call(
            node.op,
            node.attributes,
            node.output,
            rank=self.rank,
            network=self.network,
            place=self._place(node),
            status=self.status,
        )
        try:
            with np.errstate(all="ignore"):  # what is not finite is looked for below
                result = entry.function(call, *arguments)
        except PeerFailed:
            raise
        except NetworkError as error:
            raise NetworkError(f"{error} (rank {self.rank} at {call.place})") from error
        except Exception as error:
            raise ExecutionError(
                f"rank {self.rank}: {node.op} failed: {type(error).__name__}: {error} ({call.place}; "
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
                raise ExecutionError(
                    f"rank {self.rank}: {node.op} gives {len(result)} results, compiled were {len(spec)} "
                    f"({self._place(node)})"
                )
            return tuple(self._conform(node, *pair) for pair in zip(result, spec))
        if not isinstance(spec, Spec) or not isinstance(result, (np.ndarray, np.generic)):
            return result
        result = np.asarray(result)
        known = all(size >= 0 for size in spec.shape)
        if result.dtype != NUMPY.get(spec.dtype) or (known and result.shape != spec.shape):
            raise ExecutionError(
                f"rank {self.rank}: {node.op} gives {result.dtype} {list(result.shape)}, compiled was "
                f"{spec.dtype} {list(spec.shape)} ({self._place(node)})"
            )
        return round_bfloat16(result) if spec.dtype == "bfloat16" else result

    def _look_for_non_finite(self, node, inputs, result):
        if self.status.overflow and self.non_finite and self.non_finite[-1].step == self.step:
            return
        if node.op in _CARRIERS or _finite(plain(result)) or not _finite(plain(tuple(inputs))):
            return
        self.status.overflow = True
        if not self.non_finite or self.non_finite[-1].step != self.step:
            self.non_finite.append(
                NonFinite(
                    self.rank, self.step, f"{node.op} ({self._place(node)})", _shapes(plain(result)), time.monotonic()
                )
            )

    @staticmethod
    def _place(node):
        micro = node.marks.get("micro")
        return (
            f"{node.scope or node.name}{f' {node.instance}' if node.instance else ''}"
            f"{'' if micro is None else f', micro batch {micro}'}"
        )


# bring what another rank made
_CARRIERS = frozenset(("Receive", "AllGather", "AlltoAll", "AllToAll", "Broadcast"))
_MOVERS = {
    "Depend": lambda inputs: inputs[0],
    "Load": lambda inputs: plain(inputs[0]),
    "UpdateState": lambda inputs: None,
    "MakeTuple": tuple,
    "TupleGetItem": lambda inputs: inputs[0][int(inputs[1])],
    "RealTupleGetItem": lambda inputs: inputs[0][int(inputs[1])],
    "StopGradient": lambda inputs: inputs[0],
    "Partial": lambda inputs: Closure(inputs[0].graph, (*inputs[0].arguments, *inputs[1:])),
    "Switch": lambda inputs: inputs[1] if bool(np.all(plain(inputs[0]))) else inputs[2],
}


def _finite(value):
    if isinstance(value, tuple):
        return all(_finite(item) for item in value)
    return not isinstance(value, np.ndarray) or value.dtype.kind != "f" or bool(np.isfinite(value).all())


def _shapes(value):
    if isinstance(value, tuple):
        return "(" + ", ".join(_shapes(item) for item in value) + ")"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)

"""Reads a compiled program in MindIR (protobuf) into plain Python objects, without MindSpore.

The schema is mindspore/train/mind_ir_pb2.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.protobuf import message_class

# TensorProto.DataType name -> (name as MindSpore prints it, bytes)
_DTYPES = {
    "UNDEFINED": ("none", 0),
    "FLOAT": ("float32", 4),
    "UINT8": ("uint8", 1),
    "INT8": ("int8", 1),
    "UINT16": ("uint16", 2),
    "INT16": ("int16", 2),
    "INT32": ("int32", 4),
    "INT64": ("int64", 8),
    "STRING": ("string", 0),
    "BOOL": ("bool", 1),
    "FLOAT16": ("float16", 2),
    "DOUBLE": ("float64", 8),
    "UINT32": ("uint32", 4),
    "UINT64": ("uint64", 8),
    "COMPLEX64": ("complex64", 8),
    "COMPLEX128": ("complex128", 16),
    "BFLOAT16": ("bfloat16", 2),
}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor.

    Args:
        shape: -1 for a size known only at run time.
        dtype: "float16", …
        itemsize: bytes of an element.
        parameter: the parameter whose memory this is (the result of an update in place).
    """

    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    parameter: str | None = None

    @property
    def bytes(self) -> int:
        """Size of the tensor; an unknown dimension counts as 0."""
        size = self.itemsize
        for dimension in self.shape:
            size *= max(dimension, 0)
        return size


@dataclass
class Node:
    """One operation, constant or call.

    Args:
        name: unique in the program; other nodes' `inputs` hold such names.
        op: "MatMul", …; "Constant"; or "call" where `callee` says what is called.
        inputs: names.
        output: Spec, a (nested) tuple of them, or None.
        attributes: of the primitive: groups, strategies, axes, ….
        marks: attributes of the node: micro, is_bp, duplicated (a recomputed node), ….
        scope: path of cells that made it, "Gradients/…" for the backward.
        instance: the primitive's instance name.
        value: a constant's value: Python object, or Spec for a tensor; a graph's name for a function.
        callee: name of a graph, or of a node that yields a closure.
        data: a constant tensor's bytes.
    """

    name: str
    op: str
    inputs: list[str]
    output: Spec | tuple | None = None
    attributes: dict = field(default_factory=dict)
    marks: dict = field(default_factory=dict)
    scope: str = ""
    instance: str = ""
    value: object = None
    callee: str | None = None
    data: bytes | None = None


@dataclass
class Graph:
    """A function: names of its inputs, nodes in an order that respects every edge, names of its outputs."""

    name: str
    inputs: list[str]
    nodes: list[Node]
    outputs: list[str]


@dataclass
class Program:
    """A compiled program.

    Args:
        main: the entry graph.
        graphs: all others by name.
        parameters: node name -> (parameter name, Spec of this device's shard).
        inputs: the data of a step, by node name.
    """

    main: Graph
    graphs: dict[str, Graph]
    parameters: dict[str, tuple[str, Spec]]
    inputs: dict[str, Spec]


def read_program(path: str | os.PathLike) -> Program:
    """Reads a MindIR file.

    Raises:
        InputError: not a MindIR file.
    """
    data = Path(path).read_bytes()
    model = message_class("mind_ir_pb2", "ModelProto")()
    try:
        model.ParseFromString(data)
    except Exception as error:  # each implementation of protobuf has its own DecodeError
        raise InputError(f"{path}: not a MindIR file ({error})") from error
    return _Reader(model).program()


class _Reader:
    """Translates one ModelProto."""

    def __init__(self, model):
        self.model = model
        self.primitives = {primitive.name: primitive for primitive in model.primitives}
        self.attributes = {name: self._attributes(primitive.attribute) for name, primitive in self.primitives.items()}
        self.graph_names = {function.name for function in model.functions}
        enum = model.DESCRIPTOR.file.message_types_by_name["TensorProto"].enum_types_by_name["DataType"]
        self.dtypes = {value.number: _DTYPES.get(value.name, (value.name.lower(), 0)) for value in enum.values}

    def program(self):
        main = self.model.graph
        parameters = {
            parameter.name: (parameter.ref_key or parameter.name.rsplit(":", 1)[-1], self._spec(parameter))
            for parameter in main.parameter
        }
        inputs = {item.name: self._spec(item.tensor[0]) for item in main.input if item.tensor}
        return Program(
            self._graph(main),
            {function.name: self._graph(function) for function in self.model.functions},
            parameters,
            inputs,
        )

    def _graph(self, proto):
        return Graph(
            proto.name,
            [item.name for item in proto.input],
            [self._node(node) for node in proto.node],
            [item.name for item in proto.output],
        )

    def _node(self, proto):
        name = proto.output[0] if proto.output else proto.name
        if proto.op_type == "Constant":
            return self._constant(name, proto)
        target = proto.op_type[5:] if proto.op_type.startswith("REF::") else proto.op_type
        shape = next((attribute for attribute in proto.attribute if attribute.name == "shape"), None)
        node = Node(
            name,
            "call",
            list(proto.input),
            self._output(shape),
            scope=proto.domain,
            marks=self._attributes([*proto.node_attr, *proto.primal_attr]),
        )
        primitive = self.primitives.get(target)
        if primitive is None:
            node.callee = target
        else:
            node.op = primitive.op_type.split("::")[-1]
            node.instance = primitive.instance_name
            node.attributes = self.attributes[target]
        return node

    def _constant(self, name, proto):
        node = Node(name, "Constant", [], scope=proto.domain)
        for attribute in proto.attribute:
            if attribute.name != "value":
                continue
            if len(attribute.tensors) == 1 and not attribute.values:
                tensor = attribute.tensors[0]
                node.value, node.data = self._spec(tensor), tensor.raw_data
            else:
                node.value = self._value(attribute)
                if isinstance(node.value, str) and node.value in self.graph_names:
                    node.callee = node.value
        return node

    def _output(self, attribute):
        if attribute is None:
            return None
        if attribute.values:
            return tuple(self._output(value) for value in attribute.values)
        specs = tuple(self._spec(tensor) for tensor in attribute.tensors)
        return specs[0] if len(specs) == 1 else specs or None

    def _spec(self, tensor):
        dtype, itemsize = self.dtypes[tensor.data_type]
        return Spec(tuple(tensor.dims), dtype, itemsize, tensor.ref_key or None)

    def _attributes(self, protos):
        return {proto.name: self._value(proto) for proto in protos}

    def _value(self, proto):
        present = {descriptor.name for descriptor, _ in proto.ListFields()}
        if "values" in present:
            return tuple(self._value(value) for value in proto.values)
        for name in ("ints", "floats", "doubles"):
            if name in present:
                values = tuple(getattr(proto, name))
                return values[0] if len(values) == 1 else values
        if "s" in present:
            return proto.s.decode("utf-8", "replace")
        for name in ("i", "f", "d"):
            if name in present:
                return getattr(proto, name)
        return None

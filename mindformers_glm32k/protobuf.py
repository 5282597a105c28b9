"""Message classes of MindSpore's protobuf files, without importing MindSpore.

Its modules (mindspore/train/mind_ir_pb2.py, node_strategy_pb2.py) are written for protoc 3 and fail to import with
protobuf 7; their serialized descriptors are taken out of the source text and given to the protobuf that is installed.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path


@functools.cache
def message_class(module: str, name: str) -> type:
    """The class of a message.

    Args:
        module: file of mindspore/train without suffix, such as "mind_ir_pb2".
        name: of the message, such as "ModelProto".
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    # find_spec does not run the package
    folder = Path(importlib.util.find_spec("mindspore").submodule_search_locations[0])
    source = ast.parse((folder / "train" / f"{module}.py").read_text(encoding="utf-8"))
    blob = None
    for node in ast.walk(source):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            blob = ast.literal_eval(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "AddSerializedFile" and blob is None:
            blob = ast.literal_eval(node.args[0])
    descriptor = descriptor_pb2.FileDescriptorProto.FromString(blob)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{descriptor.package}.{name}"))

"""PyTorch's `.bin`/`.pt` files, the zip format since version 1.6, read without executing their pickle.

The archive holds `<prefix>/data.pkl`, a pickle that rebuilds a dictionary of tensors, and one stored (uncompressed)
record `<prefix>/data/<key>` per storage: the values are read straight from the file. Sources: torch/serialization.py,
torch/_utils.py.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.tensors import FROM_TORCH_STORAGE, ITEM_SIZE, StoredTensor

_MAX_PICKLE = 16 << 20  # bytes; a state dict's pickle takes about 150 per tensor
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before 1.6
_WRAPPERS = ("state_dict", "module", "model")  # keys under which trainers put the state dict
_MAX_AXES = 64  # torch's own limit
# What the pickle of a state dict is made of: containers, numbers, strings, references, and calls of known functions.
_OPERATIONS = (
    "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT "
    "LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID REDUCE BUILD"
)


class _Storage(NamedTuple):
    """A storage that the pickle refers to."""

    kind: str  # torch's class, "HalfStorage"
    key: str  # the record's name
    count: int


class _View(NamedTuple):
    """A tensor: a view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageKind(NamedTuple):
    name: str


class _Dictionary(dict):
    """A dictionary of the pickle: its keys are str or int, cheap to hash, and no tensor overwrites an entry."""

    def __setitem__(self, key, value):
        if type(key) not in (str, int):
            raise TypeError(f"a key that is a {type(key).__name__}")
        if key in self and isinstance(value, _View):
            raise _RepeatedKey(key)
        super().__setitem__(key, value)


class _RepeatedKey(Exception):
    pass


def _ordered_dict(items=()):
    result = _Dictionary()
    for key, value in items.items() if isinstance(items, _Dictionary) else items:
        result[key] = value
    return result


def _rebuild_tensor(storage, offset, shape, strides, *_):
    numbers = (offset, *shape, *strides)
    if not (
        isinstance(storage, _Storage)
        and len(shape) == len(strides) <= _MAX_AXES
        and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    ):
        raise ValueError("a tensor whose storage, shape or strides are none")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_):
    if not isinstance(data, _View):
        raise TypeError("a parameter of something else than a tensor")
    return data


_FUNCTIONS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Refused(Exception):
    """The pickle wants something that no file of weights needs."""


class _Operations(dict):
    def __missing__(self, code):
        operation = pickletools.code2op.get(chr(code))
        raise _Refused(f"the pickle operation {operation.name if operation else code}")


class _StateDictUnpickler(pickle._Unpickler):
    """The standard library's unpickler, with nothing to import and nothing to call but what a state dict needs.

    It is the one written in Python: the one in C allocates its memo by the largest index that the pickle names.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return _StorageKind(name)
        if (module, name) not in _FUNCTIONS:
            raise _Refused(f"to call {module}.{name}")
        return _FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count = pid
        if (type(kind), type(storage), type(key), type(count)) != (str, _StorageKind, str, int) or kind != "storage":
            raise ValueError("a reference that is not to a storage")
        return _Storage(storage.name, key, count)

    def _load_empty_dictionary(self):
        self.append(_Dictionary())

    def _load_reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        if not any(function is known for known in _FUNCTIONS.values()):
            shown = function if type(function) in (int, str, _StorageKind) else f"a {type(function).__name__}"
            raise _Refused(f"to call {shown}")
        self.append(function(*arguments))

    def _load_build(self):
        self.stack.pop()
        if not isinstance(self.stack[-1], _Dictionary):  # attributes of a state dict (`_metadata`) carry no weights
            raise _Refused(f"to set the state of a {type(self.stack[-1]).__name__}")

    dispatch = _Operations(
        (code, load)
        for code, load in pickle._Unpickler.dispatch.items()
        if pickletools.code2op[chr(code)].name in _OPERATIONS.split()
    )
    dispatch[pickle.EMPTY_DICT[0]] = _load_empty_dictionary
    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.BUILD[0]] = _load_build


def _unpickle(data, path):
    """The pickle's value, of plain containers, strings, numbers and _View; executes nothing."""
    try:
        return _StateDictUnpickler(io.BytesIO(data)).load()
    except _Refused as error:
        raise InputError(
            f"{path}: refused: the pickle wants {error}, which no file of weights needs; nothing "
            "was executed. Get the weights as safetensors, or from a source you trust"
        ) from error
    except _RepeatedKey as error:
        raise InputError(f"{path}: key {error.args[0]!r} stands twice in data.pkl") from error
    except (
        *(pickle.UnpicklingError, EOFError, struct.error, ValueError, IndexError, KeyError),
        *(TypeError, AttributeError, OverflowError, RecursionError),
    ) as error:
        raise InputError(f"{path}: data.pkl is corrupt ({type(error).__name__}: {error}); download it again") from error


def read_torch(path: Path) -> list[StoredTensor]:
    """Lists the tensors of a `.bin`/`.pt` file in the order of its dictionary; dtypes other than a weight's keep the
    name of torch's storage ("LongStorage").

    Raises:
        InputError: another format, truncated, corrupt, or a pickle that wants anything but tensors.
    """
    with _open_archive(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise InputError(f"{path}: a zip archive with {len(pickles)} data.pkl, a PyTorch file has one")
        prefix = pickles[0][: -len("data.pkl")]
        if prefix + "byteorder" in records and _read_small(archive, prefix + "byteorder", path) != b"little":
            raise InputError(f"{path}: written on a big-endian machine; save it again on a little-endian one")
        state = _unpickle(_read_small(archive, pickles[0], path), path)
        if not isinstance(state, _Dictionary):
            raise InputError(f"{path}: holds a {type(state).__name__}, a dictionary of tensors is needed")
        state = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), _Dictionary)), state)
        with open(path, "rb") as handle:
            return [_stored(path, handle, records, prefix, key, value) for key, value in state.items()]


def _open_archive(path):
    with open(path, "rb") as handle:
        head = handle.read(len(_LEGACY_MAGIC))
    if head == _LEGACY_MAGIC:
        raise InputError(f"{path}: PyTorch's format of before version 1.6; load and save it once with a newer PyTorch")
    if not head.startswith(b"PK"):
        raise InputError(f"{path}: not a PyTorch file (it starts with {head[:8]!r}); download it again")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: the file is cut off or corrupt ({error}); download it again") from error


def _read_small(archive, name, path):
    if archive.getinfo(name).file_size > _MAX_PICKLE:
        raise InputError(
            f"{path}: {name} has {archive.getinfo(name).file_size} bytes, at most {_MAX_PICKLE} are expected"
        )
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: {name} is corrupt ({error}); download it again") from error


def _stored(path, handle, records, prefix, key, view):
    if not isinstance(key, str) or not isinstance(view, _View):
        raise InputError(f"{path}: key {key!r} holds a {type(view).__name__}, a tensor is needed")
    name = f"{prefix}data/{view.storage.key}"
    info = records.get(name)
    if info is None:
        raise InputError(f"{path}: key {key!r}: its record {name} is missing from the archive; download it again")
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(
            f"{path}: key {key!r}: its record {name} is compressed; torch.save never compresses: unpack "
            "and zip again with `zip -0`"
        )
    start = _data_start(path, handle, info)
    dtype = FROM_TORCH_STORAGE.get(view.storage.kind, view.storage.kind)
    item = ITEM_SIZE.get(dtype)
    if item is None:
        return StoredTensor(key, view.shape, dtype, path, ((start, info.file_size),))
    if view.storage.count * item != info.file_size:
        raise InputError(
            f"{path}: key {key!r}: {view.storage.count} values of {dtype} need "
            f"{view.storage.count * item} bytes, record {name} has {info.file_size}"
        )
    last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.strides))
    count = prod(view.shape)
    if count and last >= view.storage.count:
        raise InputError(
            f"{path}: key {key!r}: shape {view.shape} reaches past the {view.storage.count} values of "
            f"record {name}; the file is corrupt"
        )
    dense = count == 0 or _row_major(view)
    first, length = start + view.offset * item, (count if dense else last + 1 - view.offset) * item
    whole = dense and length == info.file_size
    return StoredTensor(
        key, view.shape, dtype, path, ((first, length),), None if dense else view.strides, info.CRC if whole else None
    )


def _row_major(view):
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _data_start(path, handle, info):
    handle.seek(info.header_offset)
    head = handle.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise InputError(
            f"{path}: record {info.filename}: no zip entry at byte {info.header_offset}; the file is corrupt"
        )
    name_length, extra_length = struct.unpack("<HH", head[26:30])
    return info.header_offset + 30 + name_length + extra_length

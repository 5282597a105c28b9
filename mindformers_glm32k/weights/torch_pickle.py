"""PyTorch's zip-pickle files (`torch.save` since 1.6), read without torch and without executing the pickle.

The archive holds `<prefix>/data.pkl`, a pickle that rebuilds a dictionary of tensors, and one stored (uncompressed)
record `<prefix>/data/<key>` per storage. The pickle's opcodes are walked by a machine that knows only what a state
dict needs: containers, numbers, strings, references to storages, and the calls that say "this tensor is this view
of that storage". Every other callable or opcode is refused by name; nothing is imported and nothing is called.

Sources: pickletools (opcodes), torch/serialization.py and torch/_utils.py (what torch.save writes).
"""
import pickletools
import struct
import zipfile
from typing import NamedTuple

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.dtypes import FROM_TORCH_STORAGE, ITEM_SIZE
from mindformers_glm32k.weights.tensors import StoredTensor, element_count

_MAX_PICKLE = 64 << 20  # bytes; a state dict's pickle takes about 150 per tensor
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before 1.6
_REBUILDS = {("torch._utils", "_rebuild_tensor_v2"): 4, ("torch._utils", "_rebuild_tensor"): 4,
             ("torch._utils", "_rebuild_parameter"): 1}
_DICT = ("collections", "OrderedDict")
_WRAPPERS = ("state_dict", "module", "model")  # keys under which trainers put the state dict


class _Global(NamedTuple):
    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


class _Storage(NamedTuple):
    kind: str  # torch's class, "HalfStorage"
    key: str   # the record's name
    count: int


class _View(NamedTuple):
    storage: _Storage
    offset: int   # elements
    shape: tuple
    strides: tuple  # elements


class _Mark:
    pass


_MARK = _Mark()


class _Dict(dict):
    """A dictionary of the pickle; a class of its own only so that BUILD may be ignored on it."""


class _Machine:
    """Walks the opcodes of one pickle and returns plain containers, strings, numbers, _Storage and _View."""

    def __init__(self, path):
        self.path, self.stack, self.memo = path, [], {}

    def refuse(self, what):
        return InputError(f"{self.path}: refused: the pickle wants {what}, which no file of weights needs; nothing "
                          "was executed. Get the weights as safetensors, or from a source you trust")

    def run(self, data):
        """Returns the pickle's value.

        Raises:
            InputError: a callable or opcode outside the known ones, or a corrupt pickle.
        """
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self.stack.pop()
                step = getattr(self, "_op_" + opcode.name.lower(), None)
                if step is None:
                    raise self.refuse(f"the pickle operation {opcode.name}")
                step(argument)
        except InputError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"{self.path}: data.pkl is corrupt ({type(error).__name__}: {error}); "
                             "download it again") from error
        raise InputError(f"{self.path}: data.pkl ends without its last operation; download it again")

    def _push(self, argument):
        self.stack.append(argument)

    def _pop_to_mark(self):
        items = []
        while self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        self.stack.pop()
        return items[::-1]

    # Names follow pickletools' opcodes in lower case.
    _op_binunicode = _op_short_binunicode = _op_binunicode8 = _op_unicode = _push
    _op_binint = _op_binint1 = _op_binint2 = _op_int = _op_long1 = _op_binfloat = _push

    def _op_proto(self, _):
        pass

    _op_frame = _op_proto

    def _op_none(self, _):
        self.stack.append(None)

    def _op_newtrue(self, _):
        self.stack.append(True)

    def _op_newfalse(self, _):
        self.stack.append(False)

    def _op_mark(self, _):
        self.stack.append(_MARK)

    def _op_pop(self, _):
        self.stack.pop()

    def _op_empty_dict(self, _):
        self.stack.append(_Dict())

    def _op_empty_list(self, _):
        self.stack.append([])

    def _op_empty_tuple(self, _):
        self.stack.append(())

    def _op_tuple(self, _):
        self.stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, count):
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError("stack is empty")
        del self.stack[-count:]
        self.stack.append(items)

    def _op_tuple1(self, _):
        self._tuple_of(1)

    def _op_tuple2(self, _):
        self._tuple_of(2)

    def _op_tuple3(self, _):
        self._tuple_of(3)

    def _op_append(self, _):
        item = self.stack.pop()
        self.stack[-1].append(item)

    def _op_appends(self, _):
        items = self._pop_to_mark()
        self.stack[-1].extend(items)

    def _op_setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def _op_setitems(self, _):
        items = self._pop_to_mark()
        for key, value in zip(items[::2], items[1::2]):
            self._set(key, value)

    def _set(self, key, value):
        target = self.stack[-1]
        if not isinstance(target, _Dict):
            raise TypeError(f"items for a {type(target).__name__}")
        if key in target and isinstance(value, _View):
            raise InputError(f"{self.path}: key {key!r} stands twice in data.pkl")
        target[key] = value

    def _op_binput(self, index):
        self.memo[index] = self.stack[-1]

    _op_long_binput = _op_put = _op_binput

    def _op_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_binget(self, index):
        self.stack.append(self.memo[index])

    _op_long_binget = _op_get = _op_binget

    def _op_global(self, argument):
        self._global(*argument.split(" ", 1))

    def _op_stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self._global(module, name)

    def _global(self, module, name):
        pair = (module, name)
        if not (pair in _REBUILDS or pair == _DICT or (module == "torch" and str(name).endswith("Storage"))):
            raise self.refuse(f"to call {module}.{name}")
        self.stack.append(_Global(module, name))

    def _op_binpersid(self, _):
        pid = self.stack.pop()
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Global) or not isinstance(key, str) or type(count) is not int:
            raise ValueError(f"a reference that is not to a storage: {pid!r}")
        self.stack.append(_Storage(storage.name, key, count))

    def _op_reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if function == _DICT:
            self.stack.append(_Dict(arguments[0]) if arguments else _Dict())
        elif function in _REBUILDS and len(arguments) >= _REBUILDS[function]:
            first = arguments[0]
            if function.name == "_rebuild_parameter":
                if not isinstance(first, _View):
                    raise TypeError("a parameter of something else than a tensor")
                self.stack.append(first)
            else:
                self.stack.append(_view(*arguments[:4]))
        else:
            raise self.refuse(f"to call {function}")

    def _op_build(self, _):
        self.stack.pop()
        if not isinstance(self.stack[-1], _Dict):  # the attributes of a state dict (`_metadata`) carry no weights
            raise self.refuse(f"to set the state of a {type(self.stack[-1]).__name__}")


def _view(storage, offset, shape, strides):
    numbers = (offset, *shape, *strides)
    if not (isinstance(storage, _Storage) and len(shape) == len(strides)
            and all(type(number) is int and number >= 0 for number in numbers)):
        raise ValueError(f"a tensor of storage {storage!r}, offset {offset!r}, shape {shape!r}, strides {strides!r}")
    return _View(storage, offset, tuple(shape), tuple(strides))


def read_torch(path):
    """Lists the tensors of a `.bin`/`.pt` file in the order of its dictionary.

    Args:
        path (pathlib.Path): the file.

    Returns:
        list[StoredTensor]: storages of other dtypes keep torch's name ("LongStorage").

    Raises:
        InputError: another format, truncated, corrupt, or a pickle that wants anything but tensors.
    """
    archive = _open_archive(path)
    with archive:
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise InputError(f"{path}: a zip archive with {len(pickles)} data.pkl, a PyTorch file has one")
        prefix = pickles[0][:-len("data.pkl")]
        if prefix + "byteorder" in records and _small(archive, prefix + "byteorder", path) != b"little":
            raise InputError(f"{path}: written on a big-endian machine; save it again on a little-endian one")
        state = _Machine(path).run(_small(archive, pickles[0], path))
        state = next((state[key] for key in _WRAPPERS if isinstance(state, _Dict) and isinstance(state.get(key), _Dict)),
                     state)
        if not isinstance(state, _Dict):
            raise InputError(f"{path}: holds a {type(state).__name__}, a dictionary of tensors is needed")
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
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{path}: the file is cut off or corrupt ({error}); download it again") from error


def _small(archive, name, path):
    if archive.getinfo(name).file_size > _MAX_PICKLE:
        raise InputError(f"{path}: {name} has {archive.getinfo(name).file_size} bytes, at most {_MAX_PICKLE} are expected")
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{path}: {name} is corrupt ({error}); download it again") from error


def _stored(path, handle, records, prefix, key, view):
    if not isinstance(key, str) or not isinstance(view, _View):
        raise InputError(f"{path}: key {key!r} holds a {type(view).__name__}, a tensor is needed")
    name = f"{prefix}data/{view.storage.key}"
    info = records.get(name)
    if info is None:
        raise InputError(f"{path}: key {key!r}: its record {name} is missing from the archive; download it again")
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: key {key!r}: its record {name} is compressed; torch.save never compresses: unpack "
                         "and zip again with `zip -0`")
    start = _data_start(path, handle, info)
    dtype = FROM_TORCH_STORAGE.get(view.storage.kind, view.storage.kind)
    item = ITEM_SIZE.get(dtype)
    if item is None:
        return StoredTensor(key, view.shape, dtype, path, ((start, info.file_size),))
    if view.storage.count * item != info.file_size:
        raise InputError(f"{path}: key {key!r}: {view.storage.count} values of {dtype} need "
                         f"{view.storage.count * item} bytes, record {name} has {info.file_size}")
    last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.strides))
    count = element_count(view.shape)
    if count and last >= view.storage.count:
        raise InputError(f"{path}: key {key!r}: shape {view.shape} reaches past the {view.storage.count} values of "
                         f"record {name}; the file is corrupt")
    dense = count == 0 or _row_major(view)
    first, length = start + view.offset * item, (count if dense else last + 1 - view.offset) * item
    whole = dense and length == info.file_size
    return StoredTensor(key, view.shape, dtype, path, ((first, length),), None if dense else view.strides,
                        info.CRC if whole else None)


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
        raise InputError(f"{path}: record {info.filename}: no zip entry at byte {info.header_offset}; the file is corrupt")
    name_length, extra_length = struct.unpack("<HH", head[26:30])
    return info.header_offset + 30 + name_length + extra_length

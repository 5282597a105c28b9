"""Reads the pickle of a PyTorch state dict without executing it.

A pickle is a program. This machine walks its operations and knows only what a state dict needs: containers, numbers,
strings, references to storages, and the calls that say "this tensor is this view of that storage". Every other
callable or operation is refused by name; nothing is imported and nothing is called.

Sources: pickletools (the operations), torch/_utils.py and torch/serialization.py (what torch.save writes).
"""

import pickletools
from typing import NamedTuple

from mindformers_glm32k.errors import InputError

_REBUILDS = {
    ("torch._utils", "_rebuild_tensor_v2"): 4,
    ("torch._utils", "_rebuild_tensor"): 4,
    ("torch._utils", "_rebuild_parameter"): 1,
}
_DICT = ("collections", "OrderedDict")


class _Global(NamedTuple):
    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


class Storage(NamedTuple):
    """A storage that the pickle refers to."""

    kind: str  # torch's class, "HalfStorage"
    key: str  # the record's name
    count: int


class View(NamedTuple):
    """A tensor: a view of a storage."""

    storage: Storage
    offset: int  # elements
    shape: tuple
    strides: tuple  # elements


class _Mark:
    pass


_MARK = _Mark()


class Dictionary(dict):
    """A dictionary of the pickle; a class of its own only so that BUILD may be ignored on it."""


class Machine:
    """Walks the opcodes of one pickle and returns plain containers, strings, numbers, Storage and View."""

    def __init__(self, path):
        self.path, self.stack, self.memo = path, [], {}

    def refuse(self, what):
        """The error for something that no file of weights needs."""
        return InputError(
            f"{self.path}: refused: the pickle wants {what}, which no file of weights needs; nothing "
            "was executed. Get the weights as safetensors, or from a source you trust"
        )

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
            raise InputError(
                f"{self.path}: data.pkl is corrupt ({type(error).__name__}: {error}); download it again"
            ) from error
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
    _op_binunicode = _op_short_binunicode = _op_binunicode8 = _push
    _op_binint = _op_binint1 = _op_binint2 = _op_long1 = _op_binfloat = _push

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
        self.stack.append(Dictionary())

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
        if not isinstance(target, Dictionary):
            raise TypeError(f"items for a {type(target).__name__}")
        if key in target and isinstance(value, View):
            raise InputError(f"{self.path}: key {key!r} stands twice in data.pkl")
        target[key] = value

    def _op_binput(self, index):
        self.memo[index] = self.stack[-1]

    _op_long_binput = _op_binput

    def _op_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_binget(self, index):
        self.stack.append(self.memo[index])

    _op_long_binget = _op_binget

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
        self.stack.append(Storage(storage.name, key, count))

    def _op_reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if function == _DICT:
            self.stack.append(Dictionary(arguments[0]) if arguments else Dictionary())
        elif function in _REBUILDS and len(arguments) >= _REBUILDS[function]:
            first = arguments[0]
            if function.name == "_rebuild_parameter":
                if not isinstance(first, View):
                    raise TypeError("a parameter of something else than a tensor")
                self.stack.append(first)
            else:
                self.stack.append(_view(*arguments[:4]))
        else:
            raise self.refuse(f"to call {function}")

    def _op_build(self, _):
        self.stack.pop()
        if not isinstance(self.stack[-1], Dictionary):  # the attributes of a state dict (`_metadata`) carry no weights
            raise self.refuse(f"to set the state of a {type(self.stack[-1]).__name__}")


def _view(storage, offset, shape, strides):
    numbers = (offset, *shape, *strides)
    if not (
        isinstance(storage, Storage)
        and len(shape) == len(strides)
        and all(type(number) is int and number >= 0 for number in numbers)
    ):
        raise ValueError(f"a tensor of storage {storage!r}, offset {offset!r}, shape {shape!r}, strides {strides!r}")
    return View(storage, offset, tuple(shape), tuple(strides))

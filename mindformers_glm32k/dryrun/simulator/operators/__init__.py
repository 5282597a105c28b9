"""The table of operators: what a compiled program's primitives compute, each a NumPy function.

An operator's function is called with a Call and the primitive's inputs:

    @operator("MatMul")
    def matmul(call, x, y, transpose_a=False, transpose_b=False):
        \"\"\"x (m, k) @ y (k, n) -> (m, n).\"\"\"

Tensors come as numpy arrays, other inputs as Python values (int, float, str, None, tuples; the file holds a bool as 0
or 1, and an empty tuple as None). bfloat16, which NumPy lacks, is held in float32 arrays whose values are bfloat16's:
the interpreter rounds every result whose `call.output` says so. Results are an array or a tuple of arrays, of the
shape and dtype of `call.output`; the interpreter checks both. Inputs must not be changed: they may be parameters or
other operators' results.

An operator that updates parameters is registered with in_place=True; it gets Parameter objects (`values.Parameter`)
where the program passes parameters, assigns their `.value`, and returns what the program sees.

What an operator does not implement it refuses (NotImplementedError), and an attribute that is not there raises: no
default is guessed. Overflow and NaN are values like any other; operators run under `numpy.errstate(all="ignore")`.
"""

from dataclasses import dataclass
from importlib import import_module

_MODULES = (
    "arithmetic",
    "attention",
    "collectives",
    "indexing",
    "inference",
    "matrix",
    "norm",
    "reductions",
    "shaping",
    "training",
)


@dataclass
class Call:
    """One call of a primitive.

    Args:
        op (str): the primitive's name.
        attributes (dict): the primitive's: axes, masks, groups, ….
        output: mindir.Spec of the result, or a (nested) tuple of them.
        rank (int): who calls.
        network (network.Network): for collectives.
        place (str): "MatMul-op12 in Default/…", for messages.
        status: the device's overflow register, an object with `overflow` (bool); the interpreter sets it.
    """

    op: str
    attributes: dict
    output: object
    rank: int = 0
    network: object = None
    place: str = ""
    status: object = None


@dataclass(frozen=True)
class Operator:
    """An entry of the table.

    Args:
        function (callable): see the module's docstring.
        in_place (bool): gets Parameters.
    """

    function: object
    in_place: bool = False


_TABLE = {}


def operator(*names, in_place=False):
    """Decorator: enters a function into the table under the primitives' names.

    Raises:
        ValueError: a name is there already.
    """

    def enter(function):
        for name in names:
            if name in _TABLE:
                raise ValueError(f"operator {name} is in the table twice")
            _TABLE[name] = Operator(function, in_place)
        return function

    return enter


def table():
    """dict[str, Operator]: all operators."""
    for name in _MODULES:
        import_module(f"{__name__}.{name}")
    return _TABLE


def collectives_of(executed):
    """Of executed operators those that talk to other ranks, sends and receives among them.

    Args:
        executed (dict[str, int]): how often each operator ran.

    Returns:
        dict[str, int]: likewise.
    """
    return {
        name: count
        for name, count in executed.items()
        if table()[name].function.__module__ == f"{__name__}.collectives"
    }

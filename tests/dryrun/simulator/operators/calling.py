"""Calls operators of the table as the interpreter does, and knows which ones the tests call."""

from functools import wraps
from types import SimpleNamespace

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Spec
from mindformers_glm32k.dryrun.simulator.operators import NUMPY, Call, plain, round_bfloat16, table

TESTED = set()  # names that a test claims with `covers`
_called = set()


def covers(*names):
    """Decorator of a test: claims operators; fails where the test calls none of them."""
    TESTED.update(names)

    def decorate(test):
        @wraps(test)
        def checked(*arguments, **options):
            _called.clear()
            test(*arguments, **options)
            assert _called & set(names), f"{test.__name__} calls none of {names}"

        return checked

    return decorate


def spec(dtype, shape=None):
    """A result's Spec; its shape is not checked where it is None."""
    return Spec(shape, dtype, 0)


def call(name, *inputs, to="float32", rank=0, network=None, status=None, **attributes):
    """Calls an operator.

    Args:
        name (str): the primitive.
        inputs: as the interpreter passes them.
        to (str | tuple[str] | Spec | tuple[Spec]): dtypes (or Specs) of the result.
        rank, network, status: of the Call.
        attributes: of the primitive.

    Returns:
        The result, bfloat16 rounded; its dtypes are checked, and the shapes that `to` states.
    """
    _called.add(name)
    entry = table()[name]
    arrays = [item for item in inputs if isinstance(item, np.ndarray) and item.flags.writeable]
    kept = [item.copy() for item in arrays]
    output = (
        to
        if isinstance(to, Spec)
        else spec(to)
        if isinstance(to, str)
        else tuple(item if isinstance(item, Spec) else spec(item) for item in to)
    )
    with np.errstate(all="ignore"):
        result = entry.function(Call(name, attributes, output, rank, network, "test", status), *inputs)
    for before, after in zip(kept, arrays):
        np.testing.assert_array_equal(before, after, err_msg=f"{name} changed its input")
    return _conform(plain(result), output)


def _conform(result, output):
    if isinstance(output, tuple):
        assert isinstance(result, tuple) and len(result) == len(output)
        return tuple(_conform(*pair) for pair in zip(result, output))
    assert isinstance(result, np.ndarray) and result.dtype == NUMPY[output.dtype], (type(result), output.dtype)
    assert output.shape is None or result.shape == output.shape, (result.shape, output.shape)
    return round_bfloat16(result) if output.dtype == "bfloat16" else result


def random(shape, dtype="float32", seed=0, scale=1.0):
    """Normal values that the dtype holds; bfloat16 as float32."""
    values = np.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape) * scale)
    if dtype == "bfloat16":
        return round_bfloat16(values.astype(np.float32))
    return values.astype(NUMPY[dtype])


def tolerance(dtype):
    """Two units in the last place, relative to values of about 1."""
    size = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    return {"rtol": size, "atol": size}


def numeric_gradient(function, inputs, dy, index, step=1e-5):
    """d sum(function(*inputs) * dy) / d inputs[index] by central differences in float64."""
    inputs = [
        item.astype(np.float64) if isinstance(item, np.ndarray) and item.dtype.kind == "f" else item for item in inputs
    ]
    x = inputs[index]
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        value = x[place]
        results = []
        for change in (step, -step):
            x[place] = value + change
            results.append(np.sum(function(*inputs) * dy))
        x[place] = value
        gradient[place] = (results[0] - results[1]) / (2 * step)
    return gradient


def register():
    """A device's overflow register."""
    return SimpleNamespace(overflow=False)

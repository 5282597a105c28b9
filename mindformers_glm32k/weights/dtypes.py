"""The three float dtypes of checkpoints: their names in each file format, and casts between them.

bfloat16 has no NumPy dtype: its values travel as uint16 bit patterns (the upper half of a float32).
"""

import functools

import numpy as np

from mindformers_glm32k.errors import InputError

# our name: (bytes, safetensors, MindSpore checkpoint, torch storage class, Hugging Face config.json, NumPy carrier)
_TABLE = {
    "fp32": (4, "F32", "Float32", "FloatStorage", "float32", np.dtype("<f4")),
    "fp16": (2, "F16", "Float16", "HalfStorage", "float16", np.dtype("<f2")),
    "bf16": (2, "BF16", "BFloat16", "BFloat16Storage", "bfloat16", np.dtype("<u2")),
}
DTYPES = tuple(_TABLE)
ITEM_SIZE = {name: row[0] for name, row in _TABLE.items()}
TO_SAFETENSORS = {name: row[1] for name, row in _TABLE.items()}
TO_MINDSPORE = {name: row[2] for name, row in _TABLE.items()}
TO_TORCH_STORAGE = {name: row[3] for name, row in _TABLE.items()}
TO_CONFIG = {name: row[4] for name, row in _TABLE.items()}
CARRIER = {name: row[5] for name, row in _TABLE.items()}
FROM_SAFETENSORS = {code: name for name, code in TO_SAFETENSORS.items()}
FROM_MINDSPORE = {code: name for name, code in TO_MINDSPORE.items()}
FROM_TORCH_STORAGE = {code: name for name, code in TO_TORCH_STORAGE.items()}
# What a training checkpoint counts in (steps, epochs, overflow); MindSpore's word: (bytes, safetensors).
_COUNTERS = {
    "Float64": (8, "F64"),
    "Int64": (8, "I64"),
    "UInt64": (8, "U64"),
    "Int32": (4, "I32"),
    "UInt32": (4, "U32"),
    "Int16": (2, "I16"),
    "UInt16": (2, "U16"),
    "Int8": (1, "I8"),
    "UInt8": (1, "U8"),
    "Bool": (1, "BOOL"),
}
_FROM_SAFETENSORS_COUNTER = {code: name for name, (_, code) in _COUNTERS.items()}


def mindspore_name(dtype):
    """MindSpore's word for any dtype that a checkpoint file may hold: "fp16", "Int64" or "I64" give one each.

    Args:
        dtype (str): of a StoredTensor.

    Returns:
        str

    Raises:
        KeyError: another dtype, as of strings.
    """
    name = _FROM_SAFETENSORS_COUNTER.get(dtype, dtype)
    return TO_MINDSPORE.get(name) or (_COUNTERS[name] and name)


def safetensors_code(dtype):
    """The safetensors code of any dtype that a checkpoint file may hold; see `mindspore_name`."""
    return TO_SAFETENSORS.get(dtype) or _COUNTERS[mindspore_name(dtype)][1]


def item_size(dtype):
    """Bytes of one value of any dtype that a checkpoint file may hold; see `mindspore_name`."""
    return ITEM_SIZE.get(dtype) or _COUNTERS[mindspore_name(dtype)][0]


def check_dtype(name):
    """Returns `name` if it is one of DTYPES; raises InputError otherwise."""
    if name not in _TABLE:
        raise InputError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return name


def cast(values, source, target):
    """Casts a flat array between the dtypes, rounding to nearest even.

    Args:
        values (numpy.ndarray): in the carrier dtype of `source`.
        source (str): "fp32", "fp16" or "bf16".
        target (str): the same.

    Returns:
        numpy.ndarray: in the carrier dtype of `target`; `values` itself when the dtypes are equal.
    """
    if source == target:
        return values
    if source == "fp32":
        return _to_bf16(values) if target == "bf16" else _narrow(values)
    return _table(source, target)[values.view("<u2")]


@functools.cache
def _table(source, target):
    """All 65536 values of a 16-bit dtype, cast: looking up is faster than any arithmetic NumPy has for it."""
    bits = np.arange(1 << 16, dtype="<u2")
    if source == "bf16":
        wide = (bits.astype("<u4") << np.uint32(16)).view("<f4")
    else:
        wide = bits.view("<f2").astype("<f4")
    return {"fp32": lambda: wide, "fp16": lambda: _narrow(wide), "bf16": lambda: _to_bf16(wide)}[target]()


def _narrow(wide):
    with np.errstate(over="ignore"):  # overflow is counted by count_overflow, where the tensor's name is known
        return wide.astype("<f2")


def _to_bf16(wide):
    bits = wide.view("<u4")
    # Adding 0x7fff plus the lowest kept bit rounds the dropped half to nearest even.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype("<u2")
    nan = np.isnan(wide)
    if nan.any():  # rounding could carry a NaN's mantissa into the exponent: keep it a quiet NaN
        rounded[nan] = (bits[nan] >> np.uint32(16)).astype("<u2") | np.uint16(0x40)
    return rounded


def count_overflow(before, after, source, target):
    """Counts finite values that a cast turned into infinity.

    Args:
        before, after (numpy.ndarray): the same values in the carriers of `source` and `target`.
        source, target (str): dtypes.

    Returns:
        int
    """
    if source == target or target == "fp32" or source == "fp16":
        return 0  # these targets hold every finite value of the source
    infinite = _is_infinite(after, target)
    return int(np.count_nonzero(infinite & ~_is_infinite(before, source))) if infinite.any() else 0


def _is_infinite(values, dtype):
    if dtype == "bf16":
        return (values & np.uint16(0x7FFF)) == np.uint16(0x7F80)
    return np.isinf(values)

"""What a training step does beside the network: assignments, the overflow register, dropout."""

from __future__ import annotations

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import (
    Array,
    Call,
    Parameter,
    as_output,
    operator,
    plain,
    rounded,
    wide,
)


def _assign(call, parameter, value):
    """Gives a parameter its new value and returns the parameter.

    Raises:
        ValueError: another shape.
    """
    value = np.asarray(value)
    if value.shape != parameter.value.shape:
        raise ValueError(f"parameter {parameter.name} is {parameter.value.shape}, assigned is {value.shape}")
    value = value.astype(parameter.value.dtype)
    parameter.value = rounded(value, "bfloat16") if parameter.dtype == "bfloat16" else value
    return parameter


@operator("Assign", in_place=True)
def assign(call: Call, parameter: Parameter, value: Array, monad: None = None) -> Parameter:
    """parameter = value. Source: mindspore.ops.assign."""
    return _assign(call, parameter, plain(value))


@operator("AssignAdd", in_place=True)
def assign_add(call: Call, parameter: Parameter, value: Array, monad: None = None) -> Parameter:
    """parameter += value. Source: mindspore.ops.assign_add."""
    return _assign(call, parameter, parameter.value + plain(value))


@operator("AssignSub", in_place=True)
def assign_sub(call: Call, parameter: Parameter, value: Array, monad: None = None) -> Parameter:
    """parameter -= value. Source: mindspore.ops.assign_sub."""
    return _assign(call, parameter, parameter.value - plain(value))


@operator("NPUAllocFloatStatus")
def alloc_float_status(call: Call) -> Array:
    """-> zeros (8,): memory for the overflow register's copy."""
    return as_output(np.zeros(8), call.output)


@operator("NPUClearFloatStatusV2")
def clear_float_status(call: Call, status: Array) -> Array:
    """Clears the device's overflow register; `status` (8,) int32 only orders the calls. -> zeros (8,) int32."""
    call.status.overflow = False
    return as_output(np.zeros(8), call.output)


@operator("NPUGetFloatStatusV2")
def get_float_status(call: Call, status: Array) -> Array:
    """The overflow register -> (8,) int32: ones when an operator made something not finite since the clear."""
    return as_output(np.full(8, call.status.overflow), call.output)


@operator("AllFinite")
def all_finite(call: Call, *tensors: Array | tuple[Array, ...]) -> Array:
    """bool: True where any of the tensors (a tuple of them, or each an input) holds NaN or infinity, despite its name.

    Source: mindspore.nn.TrainOneStepWithLossScaleCell, which takes the result for the overflow flag.
    """
    tensors = tensors[0] if isinstance(tensors[0], tuple) else tensors
    overflow = any(not np.isfinite(tensor).all() for tensor in tensors)
    return np.full(call.output.shape, overflow)


@operator("Dropout")
def dropout(call: Call, x: Array, keep_prob: float, seed0: int = 0, seed1: int = 0) -> tuple[Array, ...]:
    """-> x and its mask. Only keep_prob 1 is implemented: dropped elements are random and differ between layouts."""
    if keep_prob != 1:
        raise NotImplementedError(
            f"Dropout with keep_prob {keep_prob} draws random numbers, which differ from layout "
            "to layout: set the dropout of the config (lora_dropout, hidden_dropout, "
            "attention_dropout) to 0"
        )
    return as_output(x, call.output[0]), as_output(np.ones(x.shape), call.output[1])


@operator("DropoutGrad")
def dropout_grad(call: Call, dy: Array, mask: Array) -> Array:
    """dy * mask / keep_prob (an attribute)."""
    return as_output(wide(dy) * wide(mask) / call.attribute("keep_prob"), call.output)

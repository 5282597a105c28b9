"""Assignments, the overflow register, dropout."""

import numpy as np
import pytest

from dryrun.simulator.operators.calling import call, covers, random, register, spec
from mindformers_glm32k.dryrun.simulator.operators import Parameter, round_bfloat16


def changed(name, value, dtype="float32"):
    """What MindSpore's own in-place operator makes of a parameter."""
    import mindspore as ms
    from mindspore import ops

    parameter = ms.Parameter(ms.Tensor(random((3, 5), dtype)), name="weight")
    {"Assign": ops.assign, "AssignAdd": ops.assign_add, "AssignSub": ops.assign_sub}[name](parameter, ms.Tensor(value))
    return parameter.asnumpy()


@covers("Assign", "AssignAdd", "AssignSub")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["Assign", "AssignAdd", "AssignSub"])
def test_assignments(name, dtype):
    start, value = random((3, 5), dtype), random((3, 5), dtype, 1)
    parameter = Parameter("weight", start, dtype)
    expected = changed(name, value, dtype)
    result = call(name, parameter, value, None, to=dtype)
    np.testing.assert_array_equal(result, expected)
    assert parameter.value is result
    np.testing.assert_array_equal(start, random((3, 5), dtype))  # an array that was read before stays as it was


@covers("Assign", "AssignAdd")
def test_a_parameter_keeps_its_dtype_and_shape():
    parameter = Parameter("weight", random((2, 2), "bfloat16"), "bfloat16")
    value = parameter.value + random((2, 2), "bfloat16", 1)
    call("AssignAdd", parameter, random((2, 2), "bfloat16", 1), to="bfloat16")
    np.testing.assert_array_equal(parameter.value, round_bfloat16(value))
    call("Assign", parameter, Parameter("other", random((2, 2), "bfloat16", 3), "bfloat16"), to="bfloat16")
    np.testing.assert_array_equal(parameter.value, random((2, 2), "bfloat16", 3))
    with pytest.raises(ValueError, match=r"parameter weight is \(2, 2\), assigned is \(2,\)"):
        call("Assign", parameter, random((2,)), to="bfloat16")


@covers("NPUAllocFloatStatus", "NPUClearFloatStatusV2", "NPUGetFloatStatusV2")
def test_overflow_register():
    status = register()
    memory = call("NPUAllocFloatStatus", to="float32")
    assert memory.shape == (8,) and not memory.any()
    zeros = np.zeros(8, np.int32)
    assert not call("NPUGetFloatStatusV2", zeros, to="int32", status=status).any()
    status.overflow = True
    assert call("NPUGetFloatStatusV2", zeros, to="int32", status=status).all()
    assert call("NPUGetFloatStatusV2", zeros, to="int32", status=status).all()  # reading does not clear
    assert not call("NPUClearFloatStatusV2", zeros, to="int32", status=status).any()
    assert not status.overflow
    assert not call("NPUGetFloatStatusV2", zeros, to="int32", status=status).any()


@covers("AllFinite")
@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf])
def test_all_finite_is_the_overflow_flag(bad):
    import mindspore as ms
    from mindspore import ops

    tensors = [random((2, 3), "float16"), random((4,)), random(())]
    if bad is not None:
        tensors[1][2] = bad
    expected = not all(ops.isfinite(ms.Tensor(tensor)).all() for tensor in tensors)
    assert expected == (bad is not None)
    for arguments in ((tuple(tensors),), tensors):
        assert call("AllFinite", *arguments, to=spec("bool", (1,))).tolist() == [expected]


@covers("Dropout", "DropoutGrad")
def test_dropout():
    import mindspore as ms
    from mindspore import ops

    x = random((4, 8))
    y, mask = call("Dropout", x, 1.0, 0, 0, to=("float32", "float32"))
    np.testing.assert_array_equal(y, x)
    assert (mask == 1).all()
    with pytest.raises(NotImplementedError, match="keep_prob 0.9 .*lora_dropout"):
        call("Dropout", x, 0.9, 0, 0, to=("float32", "float32"))
    dropped, mask = (item.asnumpy() for item in ops.operations.Dropout(keep_prob=0.75)(ms.Tensor(x)))
    # what it does to x forward it does to dy backward
    np.testing.assert_allclose(call("DropoutGrad", x, mask.astype(np.float32), keep_prob=0.75), dropped, rtol=1e-6)

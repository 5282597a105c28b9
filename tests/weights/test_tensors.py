"""Casts against definitions: NumPy's own for fp16, nearest-even by brute force for bf16."""

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.tensors import cast, check_dtype, count_overflow

BITS = np.arange(1 << 16, dtype=np.uint16)


def bf16_value(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_every_16_bit_value_survives_the_way_through_fp32():
    for source, values in (("fp16", BITS.view(np.float16)), ("bf16", BITS)):
        back = cast(cast(values, source, "fp32"), "fp32", source).view(np.uint16)
        finite = np.isfinite(cast(values, source, "fp32"))
        assert np.array_equal(back[finite], BITS[finite])
        assert np.array_equal(
            np.isnan(cast(back.view(values.dtype), source, "fp32")), np.isnan(cast(values, source, "fp32"))
        )


def test_fp32_to_bf16_is_the_nearest_and_ties_go_to_even():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    ties = ((generator.integers(0, 0x7F00, 1000, dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], ties])
    result = cast(values, "fp32", "bf16")
    below = (values.view(np.uint32) >> 16).astype(np.uint16)
    above = below + np.uint16(1)
    with np.errstate(over="ignore", invalid="ignore"):
        down = np.abs(values.astype(np.float64) - bf16_value(below).astype(np.float64))
        # The neighbour above the largest value is infinity in the format but 2^128 for the purpose of rounding.
        up_value = bf16_value(above).astype(np.float64)
        up_value = np.where(np.isinf(up_value), np.copysign(2.0**128, values), up_value)
        up = np.abs(up_value - values.astype(np.float64))
    expected = np.where(down < up, below, np.where(up < down, above, np.where(below % 2 == 0, below, above)))
    assert np.array_equal(result, expected)


def test_nan_stays_nan():
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(bf16_value(cast(nans, "fp32", "bf16"))).all()


def test_16_bit_to_16_bit_equals_the_way_through_fp32():
    for source, target, values in (("fp16", "bf16", BITS.view(np.float16)), ("bf16", "fp16", BITS)):
        wide = cast(values, source, "fp32")
        direct, through = cast(values, source, target), cast(wide, "fp32", target)
        number = ~np.isnan(wide)
        assert np.array_equal(direct[number], through[number])


def test_overflow_is_counted():
    values = np.array([1.0, 65504.0, 65520.0, -1e30, np.inf], np.float32)
    assert count_overflow(values, cast(values, "fp32", "fp16"), "fp32", "fp16") == 2
    assert count_overflow(values, cast(values, "fp32", "bf16"), "fp32", "bf16") == 0
    largest = np.array([np.finfo(np.float32).max], np.float32)
    assert count_overflow(largest, cast(largest, "fp32", "bf16"), "fp32", "bf16") == 1
    half = np.array([60000.0, np.inf], np.float16)
    assert count_overflow(half, cast(half, "fp16", "bf16"), "fp16", "bf16") == 0


def test_unknown_dtype():
    with pytest.raises(InputError, match="'int8'.*fp32, fp16, bf16"):
        check_dtype("int8")

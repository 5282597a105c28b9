"""Prediction's kernels against upstream's portable arithmetic: rotation, cache, attention over blocks."""

import numpy as np
import pytest
from scipy import special

from dryrun.simulator.operators.calling import call, covers, random, spec, tolerance
from dryrun.simulator.operators.mindspore_cpu import run
from mindformers_glm32k.dryrun.simulator.operators import Parameter

BLOCK, HEADS, GROUPS, SIZE = 4, 4, 2, 6
HALVES = ("float16", "bfloat16", "float32")


def angles(length, size):
    """cos and sin of a GLM table: pairs turn in the first half of a head, the second stays."""
    theta = np.outer(np.arange(length), 1.0 / 10000 ** (np.arange(0, size // 2, 2) / (size // 2)))
    pairs = np.repeat(theta, 2, -1)
    still = np.ones((length, size - pairs.shape[1]))
    return np.concatenate([np.cos(pairs), still], -1), np.concatenate([np.sin(pairs), 0 * still], -1)


def upstream_rotation(x, cos, sin, interleaved):
    """x * cos + x @ swap_mask * sin, by upstream's own swap matrices and MindSpore's kernels."""
    from mindformers.models.glm2.glm2_modules import FreqsMgrRope
    from mindspore import ops

    size = x.shape[-1]
    swap = FreqsMgrRope.get_swap_mask_llama(size)
    if interleaved:  # the same for pairs: halves -> pairs
        order = np.arange(size).reshape(2, -1).T.reshape(-1)
        swap = swap[order][:, order]
    return run(
        lambda x, cos, sin, swap: x * cos + ops.matmul(x, swap) * sin,
        *(item.astype(np.float32) for item in (x, cos, sin, swap)),
    )


@covers("ApplyRotaryPosEmb")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cos_format", [2, 3])
def test_rotation_in_prefill(cos_format, dtype):
    size, lengths = 8, (5, 3)
    cos, sin = (call("Cast", item, to=dtype) for item in angles(9, size))
    query, key = random((1, 10, 4 * size), dtype), random((1, 10, 2 * size), dtype, 1)
    results = call(
        "ApplyRotaryPosEmb", query, key, cos, sin, np.array(lengths, np.int32), cos_format, to=(dtype, dtype)
    )
    rows = [*range(5), *range(3)]  # every prompt starts at angle 0
    for x, result in zip((query, key), results):
        heads = x[0, :8].reshape(8, -1, size)
        expected = upstream_rotation(heads, cos[rows][:, None], sin[rows][:, None], cos_format == 3).reshape(8, -1)
        np.testing.assert_allclose(result[0, :8], expected, **tolerance(dtype))
        np.testing.assert_array_equal(result[0, 8:], x[0, 8:])  # behind the last prompt


@covers("ApplyRotaryPosEmb")
def test_rotation_in_decode():
    size = 8
    table = angles(20, size)
    places = np.array([13, 2, 7])
    cos, sin = (item[places].astype(np.float32) for item in table)
    query, key = random((3, 1, 4 * size)), random((3, 1, 2 * size), seed=1)
    result, _ = call(
        "ApplyRotaryPosEmb", query, key, cos, sin, (places + 1).astype(np.int32), 3, to=("float32", "float32")
    )
    expected = upstream_rotation(query.reshape(3, 4, size), cos[:, None], sin[:, None], True)
    np.testing.assert_allclose(result.reshape(expected.shape), expected, atol=1e-6)


@covers("ApplyRotaryPosEmb")
def test_rotation_of_other_formats_or_lengths_is_refused():
    cos = np.ones((4, 8), np.float32)
    x = random((1, 3, 8))
    with pytest.raises(NotImplementedError, match="cos_format 0"):
        call("ApplyRotaryPosEmb", x, x, cos, cos, np.array([3], np.int32), 0, to=("float32",) * 2)
    with pytest.raises(ValueError, match=r"prompts of \[4\] tokens in a call of 3"):
        call("ApplyRotaryPosEmb", x, x, cos, cos, np.array([4], np.int32), 3, to=("float32",) * 2)


def cache(dtype="float32", blocks=5, seed=0):
    return Parameter("cache", random((blocks, BLOCK, GROUPS, SIZE), dtype, seed), dtype)


@covers("ReshapeAndCache")
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_go_to_their_slots(dtype):
    keys, values = cache(dtype), cache(dtype, seed=1)
    before = keys.value.copy()
    key, value = random((1, 5, GROUPS * SIZE), dtype, 2), random((1, 5, GROUPS * SIZE), dtype, 3)
    slots = np.array([7, 0, -1, 19, 8], np.int32)
    result = call("ReshapeAndCache", key, value, keys, values, slots, None, to=dtype)
    np.testing.assert_array_equal(result, key)
    for parameter, rows in ((keys, key), (values, value)):
        for row, slot in zip(rows[0], slots):
            if slot >= 0:
                np.testing.assert_array_equal(parameter.value[slot // BLOCK, slot % BLOCK], row.reshape(GROUPS, SIZE))
    untouched = [slot for slot in range(20) if slot not in slots]
    np.testing.assert_array_equal(keys.value.reshape(20, -1)[untouched], before.reshape(20, -1)[untouched])
    with pytest.raises(IndexError, match="in a cache of 20"):
        call("ReshapeAndCache", key, value, keys, values, slots + 1, None, to=dtype)


def paged(query, keys, values, tables, lengths, dtype="float32", **options):
    options = {"antiquant_scale": None, "attn_mask": None, "quant": 0, **options}
    return call(
        "PagedAttention",
        query,
        keys.value,
        values.value,
        np.array(tables, np.int32),
        np.array(lengths, np.int32),
        options["antiquant_scale"],
        None,
        options["attn_mask"],
        None,
        None,
        HEADS,
        0.4,
        GROUPS,
        options["quant"],
        0,
        0,
        to=spec(dtype, query.shape),
    )


@covers("PagedAttention")
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_over_blocks(dtype):
    keys, values = cache(dtype), cache(dtype, seed=1)
    tables, lengths = [[3, 0, -1], [1, -1, -1], [2, 4, 0]], [6, 4, 9]
    query = random((3, 1, HEADS * SIZE), dtype, 2)
    result = paged(query, keys, values, tables, lengths, dtype)
    for row in range(3):
        slots = [tables[row][place // BLOCK] * BLOCK + place % BLOCK for place in range(lengths[row])]
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            k, v = (item.value.reshape(-1, GROUPS, SIZE)[slots, group].astype(np.float64) for item in (keys, values))
            q = query[row, 0].reshape(HEADS, SIZE)[head].astype(np.float64)
            expected = special.softmax(k @ q * 0.4) @ v
            np.testing.assert_allclose(result[row, 0].reshape(HEADS, SIZE)[head], expected, **tolerance(dtype))


@covers("PagedAttention", "ReshapeAndCache", "FlashAttentionScore")
def test_a_decoded_token_equals_the_last_of_a_prefill():
    length = 7
    q, k, v = (random((length, heads * SIZE), seed=heads) for heads in (HEADS, GROUPS, GROUPS + 10))
    v = v[:, : GROUPS * SIZE]
    keys, values = cache(), cache()
    call("ReshapeAndCache", k, v, keys, values, np.array([*range(8, 12), *range(0, 3)], np.int32), None)
    decoded = paged(q[-1:].reshape(1, 1, -1), keys, values, [[2, 0]], [length])
    mask = np.triu(np.ones((128, 128), np.float32), 1)
    whole = call(
        "FlashAttentionScore",
        q,
        k,
        v,
        None,
        None,
        None,
        mask,
        None,
        (length,),
        (length,),
        HEADS,
        1.0,
        0.4,
        65536,
        0,
        0,
        5,
        0,
        to=("float32", "float32", spec("float32", (1,)), "float32"),
    )[3]
    np.testing.assert_allclose(decoded[0, 0], whole[-1], atol=1e-6)


@covers("PagedAttention")
def test_what_is_not_implemented_is_refused():
    keys, values, query = cache(), cache(), random((1, 1, HEADS * SIZE))
    for options, message in (
        ({"antiquant_scale": np.ones(1)}, "antiquant_scale"),
        ({"attn_mask": np.ones(1)}, "attn_mask"),
        ({"quant": 1}, "kv_cache_quant_mode 1"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            paged(query, keys, values, [[0]], [2], **options)
    with pytest.raises(IndexError, match="a prompt of 9 tokens in the blocks"):
        paged(query, keys, values, [[0, 1]], [9])
    with pytest.raises(IndexError, match="a prompt of 5 tokens in the blocks"):
        paged(query, keys, values, [[0, -1]], [5])

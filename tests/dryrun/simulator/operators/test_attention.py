"""Flash attention against its formula in float64, its gradient against MindSpore's and central differences."""

import numpy as np
import pytest
from scipy import special

from dryrun.simulator.operators.calling import call, covers, numeric_gradient, random, spec
from dryrun.simulator.operators.mindspore_cpu import run

LAYOUTS = {"BSH": 0, "BNSD": 1, "SBH": 2, "BSND": 3, "TND": 4, "TH": 5}
TRIANGLE = np.triu(np.ones((2048, 2048), np.uint8), 1)
TRIANGLE.flags.writeable = False  # as a program's constants
SCALE = 0.3
ATOL = {"float64": 1e-10, "float32": 2e-6, "float16": 3e-3, "bfloat16": 3e-2}


def formula(q, k, v, hidden=None):
    """Vaswani et al. (arXiv:1706.03762), equation 1, each key head for N / K query heads. (B, N, S, D) -> the same, and
    the largest score and the sum of exponentials, (B, N, S, 1)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    scores = np.einsum("bnsd,bntd->bnst", q, np.repeat(k, share, 1)) * SCALE
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores)
    largest = scores.max(-1, keepdims=True)
    out = np.einsum("bnst,bntd->bnsd", special.softmax(scores, -1), np.repeat(v, share, 1))
    return out, largest, np.exp(scores - largest).sum(-1, keepdims=True)


def laid_out(x, layout):
    """(B, N, S, D) in a layout."""
    batch, heads, length, size = x.shape
    if layout == "BNSD":
        return x
    x = x.transpose(0, 2, 1, 3)
    if layout == "SBH":
        return x.transpose(1, 0, 2, 3).reshape(length, batch, -1)
    return x if layout == "BSND" else x.reshape(batch, length, -1)


def attend(
    q,
    k,
    v,
    heads,
    layout="BNSD",
    mask=None,
    mode=0,
    pre=65536,
    following=0,
    lengths=(None, None),
    dtype="float32",
    keep_prob=1.0,
    real_shift=None,
):
    statistics = "float64" if dtype == "float64" else "float32"
    return call(
        "FlashAttentionScore",
        q,
        k,
        v,
        real_shift,
        None,
        None,
        mask,
        None,
        *lengths,
        heads,
        keep_prob,
        SCALE,
        pre,
        following,
        0,
        LAYOUTS[layout],
        mode,
        to=(statistics, statistics, spec(dtype, (1,)), spec(dtype, q.shape)),
    )


def attend_grad(
    q,
    k,
    v,
    dy,
    forward,
    heads,
    layout="BNSD",
    mask=None,
    mode=0,
    pre=65536,
    following=0,
    lengths=(None, None),
    dtype="float32",
):
    largest, total, _, out = forward
    return call(
        "FlashAttentionScoreGrad",
        q,
        k,
        v,
        dy,
        None,
        None,
        None,
        mask,
        largest,
        total,
        np.zeros(1, q.dtype),
        out,
        None,
        *lengths,
        heads,
        1.0,
        SCALE,
        pre,
        following,
        0,
        LAYOUTS[layout],
        mode,
        to=(*(spec(dtype, x.shape) for x in (q, k, v)), spec(dtype, (0,))),
    )


def heads_of(batch=2, query_heads=4, key_heads=2, queries=5, keys=5, size=3, dtype="float32"):
    return (
        random((batch, query_heads, queries, size), dtype),
        random((batch, key_heads, keys, size), dtype, 1),
        random((batch, key_heads, keys, size), dtype, 2),
    )


def causal(queries, keys, corner=0):
    return np.triu(np.ones((queries, keys), bool), 1 + corner)


@covers("FlashAttentionScore")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["BSH", "BNSD", "SBH", "BSND"])
def test_layouts(layout, dtype):
    q, k, v = heads_of(dtype=dtype)
    expected, largest, total = formula(q, k, v, causal(5, 5))
    maximum, sums, _, out = attend(*(laid_out(x, layout) for x in (q, k, v)), 4, layout, TRIANGLE, 2, dtype=dtype)
    np.testing.assert_allclose(out, laid_out(expected, layout), rtol=0, atol=ATOL[dtype])
    np.testing.assert_allclose(maximum, np.repeat(largest, 8, -1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums, np.repeat(total, 8, -1), rtol=1e-5)


@covers("FlashAttentionScore")
@pytest.mark.parametrize("query_heads, key_heads", [(4, 4), (4, 1), (6, 3)])
def test_key_heads_are_shared(query_heads, key_heads):
    q, k, v = heads_of(query_heads=query_heads, key_heads=key_heads)
    np.testing.assert_allclose(attend(q, k, v, query_heads)[3], formula(q, k, v)[0], atol=ATOL["float32"])


@covers("FlashAttentionScore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_mindspores_numbers(layout):
    from mindspore.ops.auto_generate import FlashAttentionScore

    assert FlashAttentionScore(4, input_layout=layout).input_layout == LAYOUTS[layout]
    with pytest.raises(NotImplementedError, match="input_layout 6: only"):
        call(
            "FlashAttentionScore",
            *heads_of(),
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            4,
            1.0,
            SCALE,
            0,
            0,
            0,
            6,
            0,
            to=("float32",) * 4,
        )


MASKS = {  # queries, keys, mask, mode, pre_tokens, next_tokens -> hidden
    "none": (5, 7, None, 0, 65536, 65536, None),
    "given": (5, 7, (random((5, 7), seed=5) > 0.5).astype(np.uint8), 0, 65536, 65536, "given"),
    "given, a batch": (5, 7, random((2, 1, 5, 7), seed=6) > 0.5, 1, 0, 0, "given"),
    "given, a head": (5, 7, random((2, 4, 5, 7), seed=7) > 0.5, 1, 0, 0, "given"),
    "causal, given": (5, 5, causal(5, 5).astype(np.uint8), 0, 65536, 0, "given"),
    "causal": (5, 5, TRIANGLE, 2, 65536, 0, causal(5, 5)),
    "causal, more keys": (5, 7, TRIANGLE, 2, 65536, 0, causal(5, 7)),
    "causal from the right": (5, 7, TRIANGLE, 3, 65536, 0, causal(5, 7, 2)),
    "band": (7, 7, TRIANGLE, 4, 2, 1, causal(7, 7, 1) | causal(7, 7, 2).T),
    "band from the right": (5, 7, TRIANGLE, 4, 2, 0, causal(5, 7, 2) | ~causal(5, 7, -1)),
}


@covers("FlashAttentionScore")
@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    queries, keys, mask, mode, pre, following, hidden = MASKS[name]
    if hidden is not None and isinstance(hidden, str):
        hidden = mask != 0
    q, k, v = heads_of(queries=queries, keys=keys)
    result = attend(q, k, v, 4, mask=mask, mode=mode, pre=pre, following=following)
    np.testing.assert_allclose(result[3], formula(q, k, v, hidden)[0], atol=ATOL["float32"])


@covers("FlashAttentionScore")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": causal(5, 5)[:4], "mode": 0}, r"a mask of \(4, 5\) for 5 queries and 5 keys"),
        ({"mask": None, "mode": 1}, "sparse_mode 1 without a mask"),
        ({"mask": causal(5, 5), "mode": 2}, r"takes a mask of 2048 x 2048, not \(5, 5\)"),
        ({"mask": None, "mode": 2}, "takes a mask of 2048 x 2048, not None"),
        ({"mask": np.ones((5, 5), bool), "mode": 1}, "a query that sees no key"),
        ({"mask": np.zeros((5, 5), bool), "mode": 0}, "shows keys outside of pre_tokens 65536 and next_tokens 0"),
        ({"mask": TRIANGLE, "mode": 5}, "sparse_mode 5"),
        ({"keep_prob": 0.9}, "keep_prob 0.9: only 1.0"),
        ({"real_shift": np.zeros(1)}, "real_shift"),
        ({"lengths": ((5,), (5,))}, "actual_seq_qlen"),
        ({"heads": 3}, "head_num 3"),
    ],
)
def test_what_is_not_implemented_is_refused(options, message):
    options = {"heads": 4, **options}
    with pytest.raises((NotImplementedError, ValueError), match=message):
        attend(*heads_of(), **options)


@covers("FlashAttentionScore")
def test_a_mask_that_leaks_is_found():
    leaking = TRIANGLE.copy()
    leaking[3, 4] = 0
    with pytest.raises(ValueError, match=r"the upper triangle as its mask, which differs at \(3, 4\)"):
        attend(*heads_of(), 4, mask=leaking, mode=2)


def sequences(lengths, dtype, size=3):
    """Queries, keys and values of several sequences: lists of (1, N, S, D)."""
    return [heads_of(1, 4, 2, length, length, size, dtype) for length in lengths]


def behind_each_other(parts, flat=False):
    """(1, N, S, D) of each sequence -> (T, N, D), or (T, N * D)."""
    x = np.concatenate([part[0].transpose(1, 0, 2) for part in parts])
    return x.reshape(len(x), -1) if flat else x


@covers("FlashAttentionScore", "FlashAttentionScoreGrad")
@pytest.mark.parametrize("mode", [2, 3])
def test_sequences_behind_each_other(mode):
    parts = sequences((5, 1, 4), "float64")
    q, k, v = (behind_each_other(items) for items in zip(*parts))
    options = {"layout": "TND", "mask": TRIANGLE, "mode": mode, "lengths": ((5, 6, 10), (5, 6, 10)), "dtype": "float64"}
    forward = attend(q, k, v, 4, **options)
    alone = [attend(*part, 4, mask=TRIANGLE, mode=mode, dtype="float64") for part in parts]
    for place in (0, 1, 3):
        np.testing.assert_allclose(forward[place], behind_each_other([item[place] for item in alone]))
    dy = random(q.shape, "float64", 9)
    gradients = attend_grad(q, k, v, dy, forward, 4, **options)
    for index in range(3):
        wanted = numeric_gradient(lambda *inputs: attend(*inputs, 4, **options)[3], [q, k, v], dy, index)
        np.testing.assert_allclose(gradients[index], wanted, atol=1e-8)
    with pytest.raises(ValueError, match="end at 9, the tensor has 10 tokens"):
        attend(q, k, v, 4, **{**options, "lengths": ((5, 6, 9), (5, 6, 9))})


def causal_blocks(ends):
    """(T, T) bool, True where a token does not see another: of another document, or later."""
    document = np.searchsorted(ends, np.arange(ends[-1]), side="right")
    return (document[:, None] != document) | causal(ends[-1], ends[-1])


@covers("FlashAttentionScore", "FlashAttentionScoreGrad")
@pytest.mark.parametrize("ends", [(4, 7, 9, 9, 9), (0, 4, 4, 9), (9,), (1, 2, 9, 9)])
def test_documents_see_themselves_only(ends):
    """All tokens in one sequence under a block-diagonal causal mask; documents may have no tokens."""
    together = heads_of(1, 4, 2, 9, 9, 3, "float64")
    q, k, v = (behind_each_other([x]) for x in together)
    options = {
        "layout": "TND",
        "mask": TRIANGLE,
        "mode": 2,
        "lengths": (np.array(ends), np.array(ends)),
        "dtype": "float64",
    }
    expected, largest, total = formula(*together, causal_blocks(ends))
    forward = attend(q, k, v, 4, **options)
    np.testing.assert_allclose(forward[3], behind_each_other([expected]), atol=1e-12)
    np.testing.assert_allclose(forward[0], behind_each_other([np.repeat(largest, 8, -1)]), atol=1e-12)
    np.testing.assert_allclose(forward[1], behind_each_other([np.repeat(total, 8, -1)]), atol=1e-12)
    dy = random(q.shape, "float64", 9)
    gradients = attend_grad(q, k, v, dy, forward, 4, **options)
    for index in range(3):
        wanted = numeric_gradient(
            lambda *inputs: behind_each_other(
                [formula(*(x.transpose(1, 0, 2)[None] for x in inputs), causal_blocks(ends))[0]]
            ),
            [q, k, v],
            dy,
            index,
        )
        np.testing.assert_allclose(gradients[index], wanted, atol=1e-8)


@covers("FlashAttentionScore")
@pytest.mark.parametrize(
    "q_ends, kv_ends, message",
    [
        ((5, 4, 9), (5, 4, 9), "one ends before it starts"),
        ((4, 9), (9, 9), r"queries \(4, 9\) and no keys"),
        ((4, 9), (4, 5, 9), "2 sequences of queries, 3 of keys"),
    ],
)
def test_ends_that_the_kernel_does_not_take_are_refused(q_ends, kv_ends, message):
    q, k, v = (behind_each_other([x]) for x in heads_of(1, 4, 2, 9, 9, 3, "float64"))
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, 4, "TND", TRIANGLE, 2, lengths=(q_ends, kv_ends), dtype="float64")


@covers("FlashAttentionScore")
@pytest.mark.parametrize("dtype, coefficient", [("float16", -10000.0), ("bfloat16", 1.0)])
def test_prefill_of_prompts_behind_each_other(dtype, coefficient):
    """The layout TH: each prompt's own length, a small triangle as the mask, padding behind the last."""
    parts = sequences((5, 2), dtype)
    padding = np.ones((3, 12), np.float16 if dtype == "float16" else np.float32)
    q = np.concatenate([behind_each_other([part[0] for part in parts], flat=True), padding])
    k, v = (np.concatenate([behind_each_other(items, flat=True), padding[:, :6]]) for items in list(zip(*parts))[1:])
    mask = np.triu(np.ones((128, 128), q.dtype), 1) * q.dtype.type(coefficient)
    maximum, _, _, out = attend(q, k, v, 4, "TH", mask, 0, lengths=((5, 2), (5, 2)), dtype=dtype)
    expected = [formula(*part, causal(length, length))[0] for part, length in zip(parts, (5, 2))]
    np.testing.assert_allclose(out[:7], behind_each_other(expected, flat=True), rtol=0, atol=ATOL[dtype])
    assert not out[7:].any() and maximum.shape == (10, 32)
    with pytest.raises(ValueError, match="the layout TH takes a mask of 128 x 128"):
        attend(q, k, v, 4, "TH", TRIANGLE, 0, lengths=((5, 2), (5, 2)), dtype=dtype)


@covers("FlashAttentionScoreGrad")
@pytest.mark.parametrize("layout", ["BSH", "BNSD", "SBH", "BSND"])
@pytest.mark.parametrize("mode", [0, 2])
def test_gradient_by_central_differences(layout, mode):
    q, k, v = (laid_out(x, layout) for x in heads_of(2, 2, 1, 4, 4, 2, "float64"))
    options = {"layout": layout, "mask": TRIANGLE if mode else None, "mode": mode, "dtype": "float64"}
    dy = random(q.shape, "float64", 7)
    gradients = attend_grad(q, k, v, dy, attend(q, k, v, 2, **options), 2, **options)
    for index in range(3):
        wanted = numeric_gradient(lambda *inputs: attend(*inputs, 2, **options)[3], [q, k, v], dy, index)
        np.testing.assert_allclose(gradients[index], wanted, atol=1e-8)


@covers("FlashAttentionScoreGrad")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradient_by_mindspore(dtype):
    import mindspore as ms
    from mindspore import ops

    q, k, v = heads_of(queries=16, keys=16, size=8, dtype=dtype)
    dy = random(q.shape, dtype, 3)
    summand = ms.Tensor(np.where(causal(16, 16), -1e30, 0).astype(np.float32))

    def loss(q, k, v):
        k, v = (ops.repeat_interleave(x, 2, axis=1) for x in (k, v))
        scores = ops.matmul(q, k.swapaxes(-1, -2)) * SCALE + summand
        return (ops.matmul(ops.softmax(scores, -1), v) * ms.Tensor(dy.astype(np.float32))).sum()

    expected = run(lambda *inputs: ms.grad(loss, (0, 1, 2))(*inputs), *(x.astype(np.float32) for x in (q, k, v)))
    forward = attend(q, k, v, 4, mask=TRIANGLE, mode=2, dtype=dtype)
    for actual, wanted in zip(attend_grad(q, k, v, dy, forward, 4, mask=TRIANGLE, mode=2, dtype=dtype), expected):
        np.testing.assert_allclose(
            actual, wanted, rtol=0, atol={"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}[dtype]
        )


@covers("FlashAttentionScoreGrad")
def test_gradient_takes_the_softmax_that_it_is_given():
    q, k, v = heads_of(dtype="float64")
    forward = attend(q, k, v, 4, dtype="float64")
    dy = random(q.shape, "float64", 3)
    right = attend_grad(q, k, v, dy, forward, 4, dtype="float64")
    # twice the sum: half the weights
    halved = attend_grad(q, k, v, dy, (forward[0], 2 * forward[1], *forward[2:]), 4, dtype="float64")
    np.testing.assert_allclose(halved[2], right[2] / 2)

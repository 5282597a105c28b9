"""TiledAttention against softmax in float64, forward and gradients, across blocks and documents."""

import mindspore as ms
import numpy as np
import pytest
from mindformers.modules.transformer import TransformerOpParallelConfig

from mindformers_glm32k.kernels.cpu import blocks, tiled_attention
from mindformers_glm32k.kernels.cpu.tiled_attention import CausalAttention, TiledAttention, VisibleBlocks

HEAD = 8


def reference(query, key, value, heads, gradient, documents=None):
    """Output and the gradients of query, key and value, in float64."""
    batch, length, width = query.shape
    groups = key.shape[-1] // HEAD
    share = heads // groups

    def split(x, count):
        return np.asarray(x, np.float64).reshape(batch, length, count, HEAD).transpose(0, 2, 1, 3)

    q, g = split(query, heads), split(gradient, heads)
    k, v = (np.repeat(split(x, groups), share, 1) for x in (key, value))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(HEAD)
    visible = np.tril(np.ones((1, length, length), bool))
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None])
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = g @ v.transpose(0, 1, 3, 2)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(HEAD)
    d_query, d_key, d_value = d_scores @ k, d_scores.transpose(0, 1, 3, 2) @ q, weights.transpose(0, 1, 3, 2) @ g

    def join(x, count):
        x = x.reshape(batch, count, -1, length, HEAD).sum(2)
        return x.transpose(0, 2, 1, 3).reshape(batch, length, count * HEAD)

    return join(weights @ v, heads), join(d_query, heads), join(d_key, groups), join(d_value, groups)


@pytest.mark.parametrize("length", [1, 17, 127])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
def test_whole_sequences_forward_and_gradients(length, heads, groups):
    random = np.random.default_rng(length)
    query, gradient = random.normal(size=(2, 2, length, heads * HEAD)).astype(np.float32)
    key, value = random.normal(size=(2, 2, length, groups * HEAD)).astype(np.float32)
    cell = CausalAttention(heads, scale_value=HEAD**-0.5)
    tensors = [ms.Tensor(x) for x in (query, key, value)]
    output = cell(*tensors)
    gradients = ms.ops.GradOperation(get_all=True, sens_param=True)(cell)(*tensors, ms.Tensor(gradient))
    for ours, theirs in zip((output, *gradients), reference(query, key, value, heads, gradient)):
        np.testing.assert_allclose(ours.asnumpy(), theirs, rtol=1e-4, atol=2e-5)


def test_half_precision_keeps_its_dtype_and_softmax_does_not_overflow():
    random = np.random.default_rng(0)
    query, key, value = (ms.Tensor(30 * random.normal(size=(1, 33, 2 * HEAD)), ms.float16) for _ in range(3))
    output = CausalAttention(2, scale_value=HEAD**-0.5)(query, key, value)
    assert output.dtype == ms.float16
    expected, *_ = reference(query.asnumpy(), key.asnumpy(), value.asnumpy(), 2, np.zeros((1, 33, 2 * HEAD)))
    np.testing.assert_allclose(output.asnumpy(), expected, rtol=2e-2, atol=0.3)


def test_no_token_sees_the_future():
    random = np.random.default_rng(1)
    tokens = random.normal(size=(1, 20, HEAD)).astype(np.float32)
    changed = tokens.copy()
    changed[:, 12:] += 5
    cell = CausalAttention(1, scale_value=1.0)
    before, after = (cell(*[ms.Tensor(x)] * 3).asnumpy() for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 1


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens, so that short sequences have many."""
    for function in (blocks.block_count, blocks.split_into_blocks):
        monkeypatch.setattr(function, "__defaults__", (16,))


def inputs(batch, length, heads, groups, seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    query, gradient = random.normal(size=(2, batch, length, heads * HEAD)).astype(np.float32)
    key, value = random.normal(size=(2, batch, length, groups * HEAD)).astype(np.float32)
    return query * scale, key * scale, value, gradient


def compare(query, key, value, gradient, heads, documents=None, dtype=ms.float32, rtol=1e-4, atol=2e-5):
    cell = TiledAttention(heads, scale_value=HEAD**-0.5)
    tensors = [ms.Tensor(x, dtype) for x in (query, key, value)]
    query, key, value, gradient = (ms.Tensor(x, dtype).asnumpy() for x in (query, key, value, gradient))
    mask = () if documents is None else (ms.Tensor(documents),)
    output = cell(*tensors, *mask)
    assert output.dtype == dtype
    gradients = ms.ops.GradOperation(get_all=True, sens_param=True)(cell)(*tensors, *mask, ms.Tensor(gradient))
    expected = reference(query, key, value, heads, gradient, documents)
    for ours, theirs in zip((output, *gradients), expected):
        assert np.isfinite(ours.asnumpy()).all()
        np.testing.assert_allclose(ours.asnumpy(), theirs, rtol=rtol, atol=atol * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("length, heads, groups", [(1, 4, 2), (17, 4, 4), (127, 4, 2), (127, 6, 1)])
def test_forward_and_gradients(small_blocks, length, heads, groups):
    compare(*inputs(2, length, heads, groups), heads)


def test_blocks_of_the_usual_size():
    compare(*inputs(1, 1000, 4, 2), 4)


def packed(batch, length, seed=0):
    """Sequences of documents of any length, the last of which is padding with an id of its own."""
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(batch):
        ends = np.sort(random.choice(length, size=min(length, random.integers(1, 6)), replace=False))
        sequences.append(np.searchsorted(ends, np.arange(length), side="right"))
        sequences[-1][-(length // 9) :] = -1
    return np.array(sequences, np.int32)


@pytest.mark.parametrize("length, heads, groups", [(17, 4, 2), (127, 6, 1), (250, 4, 4)])
def test_documents_do_not_see_each_other(small_blocks, length, heads, groups):
    compare(*inputs(3, length, heads, groups), heads, documents=packed(3, length))


def test_documents_in_any_order(small_blocks):
    documents = np.random.default_rng(1).integers(0, 3, size=(2, 50)).astype(np.int32)
    compare(*inputs(2, 50, 4, 2), 4, documents=documents)


@pytest.mark.parametrize("with_documents", [False, True])
def test_half_precision(small_blocks, with_documents):
    documents = packed(2, 70) if with_documents else None
    compare(*inputs(2, 70, 4, 2), 4, documents=documents, dtype=ms.float16, rtol=2e-2, atol=2e-3)


def test_large_scores_neither_overflow_nor_vanish(small_blocks):
    compare(*inputs(1, 60, 2, 1, scale=30.0), 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("with_documents", [False, True])
def test_pynative_mode(small_blocks, monkeypatch, with_documents):
    """No program, so no loop in it: a block of queries at a time, and no S x S scores either."""
    masks = []

    def recorded(query, key, bias=tiled_attention.causal_bias):
        masks.append((len(query), len(key)))
        return bias(query, key)

    monkeypatch.setattr(tiled_attention, "causal_bias", recorded)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    compare(*inputs(2, 40, 4, 2), 4, documents=packed(2, 40) if with_documents else None)
    assert set(masks) == {(14, 14), (14, 28), (12, 40)}


def test_upstream_asks_it_to_shard_itself():
    assert TiledAttention(2).shard(TransformerOpParallelConfig()) is None
    assert "shard" in vars(CausalAttention)  # nn.Cell's takes a tuple


def test_which_blocks_are_visited():
    documents = ms.Tensor(
        [[0, 0], [0, 0], [0, 1], [1, 1], [1, 1], [2, -1], [5, 5], [5, 5], [5, 5], [5, 5], [5, 5], [6, 6]], ms.int32
    )
    first, plain = (x.asnumpy().tolist() for x in VisibleBlocks()(documents, 2, 6))
    assert first == [0, 0, 0, 2, 2, 5, 6, 6, 6, 6, 6, 11]
    assert plain == [0, 0, 2, 3, 3, 5, 6, 6, 6, 6, 6, 11]
    first, plain = (x.asnumpy().tolist() for x in VisibleBlocks()(None, 2, 3))
    assert first == plain == [0, 0, 0, 3, 3, 3]


def test_dropout_takes_the_plain_form():
    cell = TiledAttention(2, keep_prob=0.5).set_train()
    tokens = ms.ops.ones((1, 40, 2 * HEAD), ms.float32)
    assert cell(tokens, tokens, tokens).asnumpy().std() > 0.1

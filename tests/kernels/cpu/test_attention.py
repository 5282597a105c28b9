"""CausalAttention against softmax in float64, forward and gradients."""

import mindspore as ms
import numpy as np
import pytest

from mindformers_glm32k.kernels.cpu.attention import CausalAttention

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
def test_forward_and_gradients(length, heads, groups):
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

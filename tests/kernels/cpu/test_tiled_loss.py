"""The loss in a loop against cross-entropy in float64: value, gradients, per-token weights, ignored labels."""

import mindspore as ms
import numpy as np
import pytest
from mindformers.modules.layers import Linear

from mindformers_glm32k import GLM32KConfig
from mindformers_glm32k.kernels.cpu.tiled_loss import LoopedLoss
from mindformers_glm32k.kernels.loss import ChunkedLoss

WIDTH, WORDS = 12, 50


def reference(hidden, weight, labels, weights):
    """Sum, and its gradients of hidden and weight, in float64."""
    hidden, weight, weights = (np.asarray(x, np.float64) for x in (hidden, weight, weights))
    logits = hidden @ weight.T
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(-1, keepdims=True)
    kept = np.clip(labels, 0, WORDS - 1)
    total = -(np.log(probabilities[np.arange(len(labels)), kept]) * weights).sum()
    gradient = probabilities.copy()
    gradient[np.arange(len(labels)), kept] -= 1
    gradient *= weights[:, None]
    return total, gradient @ weight, gradient.T @ hidden


def inputs(tokens, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, WORDS, tokens).astype(np.int32)
    weights = random.uniform(0, 2, tokens).astype(np.float32)
    ignored = random.uniform(size=tokens) < 0.3
    labels[ignored], weights[ignored] = -100, 0
    return (
        random.normal(size=(tokens, WIDTH)).astype(np.float32),
        random.normal(size=(WORDS, WIDTH)).astype(np.float32),
        labels,
        weights,
    )


def value_and_gradients(loss, hidden, weight, labels, weights, dtype):
    class Scaled(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.loss = loss

        def construct(self, hidden, weight, labels, weights):
            return self.loss(hidden, weight, labels, weights)[0] * 3.0

    tensors = [ms.Tensor(hidden, dtype), ms.Tensor(weight, dtype), ms.Tensor(labels), ms.Tensor(weights)]
    return ms.value_and_grad(Scaled(), (0, 1))(*tensors)


@pytest.mark.parametrize("tokens, largest", [(1, 512), (17, 8), (127, 40), (1000, 512)])
@pytest.mark.parametrize("dtype, tolerance", [(ms.float32, 1e-5), (ms.float16, 2e-3)])
def test_value_and_gradients(tokens, largest, dtype, tolerance):
    hidden, weight, labels, weights = inputs(tokens)
    hidden, weight = (ms.Tensor(x, dtype).asnumpy() for x in (hidden, weight))
    total, gradients = value_and_gradients(LoopedLoss(False, largest), hidden, weight, labels, weights, dtype)
    expected, *theirs = reference(hidden, weight, labels, weights)
    assert float(total) == pytest.approx(3 * expected, rel=tolerance)
    for ours, gradient in zip(gradients, theirs):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.asnumpy(), 3 * gradient, atol=tolerance * 3 * np.abs(gradient).max() + 1e-7)


def test_frozen_layer_gets_no_gradient_and_the_hidden_states_the_same():
    data = inputs(40)
    _, (hidden, weight) = value_and_gradients(LoopedLoss(True, 16), *data, ms.float32)
    np.testing.assert_allclose(hidden.asnumpy(), 3 * reference(*data)[1], rtol=1e-4, atol=1e-4)
    assert not weight.asnumpy().any()


def test_which_form_an_output_layer_gets():
    def config(**fields):
        return GLM32KConfig(
            num_layers=1,
            hidden_size=64,
            num_attention_heads=4,
            kv_channels=16,
            ffn_hidden_size=64,
            padded_vocab_size=WORDS,
            seq_length=16,
            **fields,
        )

    layer = Linear(WIDTH, WORDS, has_bias=False)
    loss = ChunkedLoss(config())
    assert loss.way(layer) == "loop"
    layer.weight.requires_grad = False
    assert loss.way(layer) == "frozen"

    class Adapter(Linear):
        """Stands for what a LoRA adapter puts in the layer's place."""

    assert loss.way(Adapter(WIDTH, WORDS, has_bias=False)) == "chunks"
    assert loss.way(Linear(WIDTH, WORDS, has_bias=True)) == "chunks"
    assert ChunkedLoss(config(cells="ascend")).way(layer) == "chunks"

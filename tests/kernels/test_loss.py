"""The losses against cross-entropy in float64: value, gradients, loss weights, ignored labels."""

import mindspore as ms
import numpy as np
import pytest
from mindformers.modules.layers import Linear
from mindformers.modules.transformer import TransformerOpParallelConfig

from mindformers_glm32k import GLM32KConfig
from mindformers_glm32k.kernels.loss import ChunkedLoss, TiledLoss, TokenLoss, chunk_bounds

WIDTH, VOCAB_SIZE = 12, 50


def reference(hidden, weight, labels, loss_weights):
    """The sum and its gradients with respect to hidden and weight, in float64."""
    hidden, weight, loss_weights = (np.asarray(x, np.float64) for x in (hidden, weight, loss_weights))
    logits = hidden @ weight.T
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(-1, keepdims=True)
    kept = np.clip(labels, 0, VOCAB_SIZE - 1)
    total = -(np.log(probabilities[np.arange(len(labels)), kept]) * loss_weights).sum()
    gradient = probabilities.copy()
    gradient[np.arange(len(labels)), kept] -= 1
    gradient *= loss_weights[:, None]
    return total, gradient @ weight, gradient.T @ hidden


def inputs(tokens, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, VOCAB_SIZE, tokens).astype(np.int32)
    loss_weights = random.uniform(0, 2, tokens).astype(np.float32)
    ignored = random.uniform(size=tokens) < 0.3
    labels[ignored], loss_weights[ignored] = -100, 0
    return (
        random.normal(size=(tokens, WIDTH)).astype(np.float32),
        random.normal(size=(VOCAB_SIZE, WIDTH)).astype(np.float32),
        labels,
        loss_weights,
    )


def value_and_gradients(loss, hidden, weight, labels, loss_weights, dtype):
    class Scaled(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.loss = loss

        def construct(self, hidden, weight, labels, loss_weights):
            return self.loss(hidden, weight, labels, loss_weights)[0] * 3.0

    tensors = [ms.Tensor(hidden, dtype), ms.Tensor(weight, dtype), ms.Tensor(labels), ms.Tensor(loss_weights)]
    return ms.value_and_grad(Scaled(), (0, 1))(*tensors)


@pytest.mark.parametrize("tokens, largest", [(1, 512), (17, 8), (127, 40), (1000, 512)])
@pytest.mark.parametrize("dtype, tolerance", [(ms.float32, 1e-5), (ms.float16, 2e-3)])
def test_value_and_gradients(tokens, largest, dtype, tolerance):
    hidden, weight, labels, loss_weights = inputs(tokens)
    hidden, weight = (ms.Tensor(x, dtype).asnumpy() for x in (hidden, weight))
    total, gradients = value_and_gradients(TiledLoss(False, largest), hidden, weight, labels, loss_weights, dtype)
    expected, *theirs = reference(hidden, weight, labels, loss_weights)
    assert float(total) == pytest.approx(3 * expected, rel=tolerance)
    for ours, gradient in zip(gradients, theirs):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.asnumpy(), 3 * gradient, atol=tolerance * 3 * np.abs(gradient).max() + 1e-7)


class SumOfTokenLosses(ms.nn.Cell):
    """TokenLoss in the place of TiledLoss: two sequences, their losses weighted and added up."""

    def __init__(self, dtype, chunk_size, frozen=False):
        super().__init__()
        config = GLM32KConfig(num_layers=1, compute_dtype=dtype, loss_chunk_size=chunk_size, cells="ascend")
        self.loss = TokenLoss(config, frozen)

    def construct(self, hidden, weight, labels, loss_weights):
        labels = ms.ops.clamp(labels, 0, VOCAB_SIZE - 1)
        tokens = self.loss(hidden.reshape((2, -1, WIDTH)), weight, labels.reshape((2, -1)))
        return ((tokens * loss_weights.reshape((2, -1))).sum(),)


@pytest.mark.parametrize("tokens, chunk_size", [(2, 512), (34, 8), (126, 40), (1000, 512)])
@pytest.mark.parametrize("name, tolerance", [("float32", 1e-5), ("float16", 2e-3)])
def test_token_losses_and_gradients(tokens, chunk_size, name, tolerance):
    dtype = getattr(ms, name)
    hidden, weight, labels, loss_weights = inputs(tokens)
    hidden, weight = (ms.Tensor(x, dtype).asnumpy() for x in (hidden, weight))
    loss = SumOfTokenLosses(name, chunk_size)
    total, gradients = value_and_gradients(loss, hidden, weight, labels, loss_weights, dtype)
    expected, *theirs = reference(hidden, weight, labels, loss_weights)
    assert float(total) == pytest.approx(3 * expected, rel=tolerance)
    for ours, gradient in zip(gradients, theirs):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.asnumpy(), 3 * gradient, atol=tolerance * 3 * np.abs(gradient).max() + 1e-7)


def test_token_losses_of_a_frozen_layer():
    data = inputs(40)
    _, (hidden, weight) = value_and_gradients(SumOfTokenLosses("float32", 16, frozen=True), *data, ms.float32)
    np.testing.assert_allclose(hidden.asnumpy(), 3 * reference(*data)[1], rtol=1e-4, atol=1e-4)
    assert not weight.asnumpy().any()


def test_chunks_cover_all_tokens():
    assert chunk_bounds(10, 4) == ((0, 4), (4, 8), (8, 10))
    assert chunk_bounds(3, 4) == ((0, 3),)


def test_frozen_layer_gets_no_gradient_and_the_hidden_states_the_same():
    data = inputs(40)
    _, (hidden, weight) = value_and_gradients(TiledLoss(True, 16), *data, ms.float32)
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
            padded_vocab_size=VOCAB_SIZE,
            seq_length=16,
            **fields,
        )

    layer = Linear(WIDTH, VOCAB_SIZE, has_bias=False)
    loss = ChunkedLoss(config())
    assert loss.mode(layer) == "tiled"
    layer.weight.requires_grad = False
    assert loss.mode(layer) == "frozen"

    class Adapter(Linear):
        """Stands for what a LoRA adapter puts in the layer's place."""

    assert loss.mode(Adapter(WIDTH, VOCAB_SIZE, has_bias=False)) == "chunked"
    assert loss.mode(Linear(WIDTH, VOCAB_SIZE, has_bias=True)) == "chunked"
    layer.weight.requires_grad = True
    assert ChunkedLoss(config(cells="ascend")).mode(layer) == "tiled"
    split_vocabulary = TransformerOpParallelConfig(model_parallel=2)
    pipeline = TransformerOpParallelConfig(pipeline_stage=2, micro_batch_num=2)
    assert ChunkedLoss(config(cells="ascend", parallel_config=pipeline)).mode(layer) == "chunked"
    assert ChunkedLoss(config(cells="ascend", parallel_config=split_vocabulary)).mode(layer) == "chunked"

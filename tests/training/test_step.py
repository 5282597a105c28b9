"""GLM32KTrainOneStepCell on a small network whose step can be computed by hand."""

import mindspore as ms
import numpy as np
import pytest
from mindformers.core.optim import AdamW
from mindspore import Parameter, Tensor, nn, ops

from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration, GLM32KTrainOneStepCell

RATE = 0.5


class Quadratic(nn.Cell):
    """loss = mean((w * x)^2) / 2: the gradient is w * mean(x^2) per element of w."""

    def __init__(self):
        super().__init__()
        self.w = Parameter(Tensor(np.array([1.0, -2.0], np.float32)), name="w")

    def construct(self, x):
        return ops.square(self.w * x).mean(0).sum() / 2


def make_step(**options):
    ms.set_context(mode=ms.GRAPH_MODE)
    network = Quadratic()
    network.set_train(True)
    return network, GLM32KTrainOneStepCell(network, nn.SGD(network.trainable_params(), RATE), **options)


def run(step, *records):
    loss, overflow, scale, rate, norm = step(Tensor(np.array(records, np.float32)))
    return float(loss), bool(overflow), float(scale), float(rate), None if norm is None else float(norm)


@pytest.mark.parametrize("scale", [1.0, 1024.0, Tensor(65536.0, ms.float32)])
def test_static_scale_does_not_change_the_step(scale):
    network, step = make_step(scale_sense=scale)
    loss, overflow, _, rate, norm = run(step, [1, 1], [3, 1])
    gradient = np.array([1.0, -2.0]) * [5.0, 1.0]
    assert (loss, overflow, rate, norm) == (pytest.approx((5 + 4) / 2), False, RATE, None)
    np.testing.assert_allclose(network.w.asnumpy(), [1.0, -2.0] - RATE * gradient, rtol=1e-6)


def test_clipping_by_the_global_norm():
    network, step = make_step(use_clip_grad=True, max_grad_norm=1.0)
    *_, norm = run(step, [2, 1])
    gradient = np.array([4.0, -2.0])
    assert norm == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
    np.testing.assert_allclose(network.w.asnumpy(), [1.0, -2.0] - RATE * gradient / norm, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_step_with_non_finite_gradients_changes_nothing(bad):
    network, step = make_step(scale_sense=nn.DynamicLossScaleUpdateCell(64, 2, 1000))
    before = network.w.asnumpy().copy()
    _, overflow, scale, *_ = run(step, [bad, 1])
    assert overflow and scale in (64, 32)
    np.testing.assert_array_equal(network.w.asnumpy(), before)
    assert float(step.scale_sense.asnumpy()) == 32  # lowered
    _, overflow, *_ = run(step, [1, 1])
    assert not overflow and not np.array_equal(network.w.asnumpy(), before)


def test_static_scale_skips_too():
    network, step = make_step(scale_sense=8.0)
    before = network.w.asnumpy().copy()
    assert run(step, [np.inf, 1])[1]
    np.testing.assert_array_equal(network.w.asnumpy(), before)


def test_optimizer_states_do_not_move_in_a_skipped_step():
    ms.set_context(mode=ms.GRAPH_MODE)
    network = Quadratic()
    network.set_train(True)
    optimizer = AdamW(network.trainable_params(), learning_rate=0.1)
    step = GLM32KTrainOneStepCell(network, optimizer, scale_sense=nn.DynamicLossScaleUpdateCell(64, 2, 1000))
    run(step, [1, 1])
    states = {parameter.name: parameter.asnumpy().copy() for parameter in optimizer.get_parameters()}
    assert any(np.abs(value).sum() > 0 for name, value in states.items() if "adam_m" in name)
    assert run(step, [np.nan, 1])[1]
    for parameter in optimizer.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), states[parameter.name], err_msg=parameter.name)


def test_dynamic_scale_grows_after_its_window():
    _, step = make_step(scale_sense=nn.DynamicLossScaleUpdateCell(4, 2, 2))
    for _ in range(2):
        run(step, [0.1, 0.1])
    assert float(step.scale_sense.asnumpy()) == 8


def language_model_step(interleave_num):
    """A tiny model's step, the batch split into interleaved parts as the trainer does it."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    model = GLM32KForConditionalGeneration(
        GLM32KConfig(
            num_layers=1,
            hidden_size=32,
            kv_channels=8,
            num_attention_heads=4,
            multi_query_group_num=2,
            ffn_hidden_size=64,
            padded_vocab_size=64,
            seq_length=16,
            param_init_type="float32",
            compute_dtype="float32",
        )
    )
    model.set_train(True)
    network = nn.MicroBatchInterleaved(model, interleave_num) if interleave_num > 1 else model
    return GLM32KTrainOneStepCell(network, nn.SGD(model.trainable_params(), RATE), use_clip_grad=True)


def test_sequences_of_different_label_counts_count_alike_however_the_batch_is_split():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (2, 16)).astype(np.int32)
    labels = np.roll(ids, -1, 1)
    labels[0, :14] = -100
    labels[:, -1] = -100
    whole, split = language_model_step(1), language_model_step(2)
    for parameter, same in zip(split.weights, whole.weights):
        parameter.set_data(Tensor(same.asnumpy().copy()))
    loss, *_, norm = whole(Tensor(ids), Tensor(labels))
    split_loss, *_, split_norm = split(Tensor(ids), Tensor(labels))
    assert float(split_loss) / 2 == pytest.approx(float(loss), rel=1e-6)  # what monitors make of it
    assert float(split_norm) == pytest.approx(float(norm), rel=1e-5)
    for parameter, same in zip(split.weights, whole.weights):
        np.testing.assert_allclose(parameter.asnumpy(), same.asnumpy(), atol=1e-6)

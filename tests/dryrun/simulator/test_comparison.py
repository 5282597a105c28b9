"""What counts as equal, and what is said when something is not."""

import numpy as np
import pytest

from mindformers_glm32k.dryrun.simulator.comparison import (
    TOLERANCES,
    NoiseWatch,
    close,
    compare_parameters,
    disagreements,
)
from mindformers_glm32k.dryrun.simulator.operators import Parameter

STRICT = TOLERANCES["float32"]
STEP = {"loss": 7.5, "grad_norm": 2.0, "overflow": False, "loss_scale": 65536.0, "learning_rate": 5e-5}


def step(**changes):
    return {**STEP, **{f"{name}_one_device": value for name, value in STEP.items()}, **changes}


def test_equal_steps_agree():
    assert disagreements([step()], [], {}, [], STRICT) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"loss": 7.5002}, "step 1: loss is 7.5002, on one device 7.5"),
        ({"grad_norm": 2.83}, "step 1: grad_norm is 2.83, on one device 2 (ratio 1.415000)"),
        ({"overflow": True}, "step 1: overflow is True"),
        ({"loss_scale": 32768.0}, "loss_scale is 32768.0, on one device 65536.0"),
        ({"loss_differs": [7.5, 7.6]}, "ranks report different values of loss: [7.5, 7.6]"),
    ],
)
def test_what_differs_is_said(change, words):
    found = disagreements([step(**change)], [], {}, [], STRICT)
    assert len(found) == 1 and words in found[0]


def test_copies_and_messages_count_too():
    found = disagreements([step()], [], {"norm.weight": ([0, 2], 0.5)}, ["rank 0 to rank 1 (tag 3): 1"], STRICT)
    assert found == [
        "norm.weight: ranks [0, 2] should hold equal copies, they differ by 0.5",
        "a message that nobody receives: rank 0 to rank 1 (tag 3): 1",
    ]


def parameters(weight, moment, other_weight=None, other_moment=None, gradients=()):
    watch = NoiseWatch(0.9)
    now = np.zeros(len(weight))
    for gradient in gradients:
        now = 0.9 * now + 0.1 * np.array(gradient)
        watch.after_step({"adam_m.w": Parameter("adam_m.w", now, "float32")})
    one = {"w": np.array(weight), "adam_m.w": np.array(moment)}
    whole = {
        "w": np.array(weight if other_weight is None else other_weight),
        "adam_m.w": np.array(moment if other_moment is None else other_moment),
    }
    return {item.name: item for item in compare_parameters(whole, one, watch.masks)}


def test_a_weight_that_differs():
    found = parameters([1.0, 2.0], [0.1, 0.1], other_weight=[1.0, 2.1], gradients=[[1, 1], [1, 1]])
    assert found["w"].relative == pytest.approx(0.05) and found["adam_m.w"].relative == 0
    assert any("w differs" in problem for problem in disagreements([], found.values(), {}, [], STRICT))


@pytest.mark.parametrize("gradients", [[[1, 1e-9], [1, 1e-9]], [[1, 1e-9], [1, 1]], [[1, 1], [1, 1e-9]]])
def test_steps_made_of_rounding_noise_are_left_out_and_counted(gradients):
    found = parameters([1.0, 2.0], [0.1, 0.1], other_weight=[1.0, 2.1], gradients=gradients)
    assert found["w"].relative == 0 and found["w"].noise == 1


def test_a_wrong_moment_is_not_noise():
    found = parameters([1.0, 2.0], [0.1, 1e-9], other_moment=[0.1, 1e-3], gradients=[[1, 1e-9]])
    assert found["adam_m.w"].relative == pytest.approx(0.01, rel=1e-3)


def test_a_bias_s_moments_are_measured_beside_its_weight_s():
    one = {"adam_m.k.weight": np.array([0.1, 0.2]), "adam_m.k.bias": np.array([1e-3]), "k.bias": np.array([1e-3])}
    whole = {**one, "adam_m.k.bias": np.array([1e-3 + 2e-7]), "k.bias": np.array([1e-3 + 2e-7])}
    found = {item.name: item.relative for item in compare_parameters(whole, one)}
    assert found["adam_m.k.bias"] == pytest.approx(1e-6, rel=1e-3)  # rounding of what cancels
    assert found["k.bias"] == pytest.approx(2e-4, rel=1e-3)
    (wrong,) = compare_parameters({"adam_m.k.bias": np.array([-1e-3])}, one)
    assert wrong.relative == pytest.approx(1e-2)


@pytest.mark.parametrize(
    "value, reference, equal",
    [
        (1.0, 1.0 + 5e-6, True),
        (1.0, 1.0 + 5e-5, False),
        (np.inf, np.inf, True),
        (np.inf, 1.0, False),
        (1.0, np.nan, False),
    ],
)
def test_close(value, reference, equal):
    assert close(value, reference, 1e-5) is equal or bool(close(value, reference, 1e-5)) is equal


def test_values_that_are_not_finite_never_agree_with_finite_ones():
    assert parameters([1.0, 2.0], [0.1, 0.1], other_weight=[1.0, np.nan])["w"].relative == np.inf

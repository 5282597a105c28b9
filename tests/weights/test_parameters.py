"""What the entries of a training checkpoint are."""

import pytest

from mindformers_glm32k.weights.parameters import plain_name


@pytest.mark.parametrize("name", ["a.b", "adam_m.a.b", "adam_v.a.b", "accu_grads.a.b"])
def test_the_weight_of_a_state(name):
    assert plain_name(name) == "a.b"

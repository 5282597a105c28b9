"""Sampling of tokens: its distribution, and that it depends on the seed alone."""

import numpy as np
import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.sampling import Sampling

LOGITS = np.log(np.array([0.5, 0.1, 0.3, 0.1], np.float32))


def shares(sampling, logits=LOGITS, times=4000):
    random = np.random.Generator(np.random.Philox(1))
    return np.bincount([sampling.draw(logits, random) for _ in range(times)], minlength=len(logits)) / times


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({}, [0.5, 0.1, 0.3, 0.1]),
        ({"top_k": 2}, [0.625, 0, 0.375, 0]),
        ({"top_p": 0.6}, [0.625, 0, 0.375, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
        ({"top_k": 100}, [0.5, 0.1, 0.3, 0.1]),
    ],
)
def test_tokens_are_drawn_by_their_probabilities(settings, wanted):
    assert shares(Sampling(**{"temperature": 1.0, **settings})) == pytest.approx(wanted, abs=0.03)


def test_greedy_is_not_random():
    assert not Sampling().is_random and not Sampling(temperature=1.0, top_k=1).is_random
    assert Sampling().stamp() == {"repetition_penalty": 1.0} and "seed" in Sampling(temperature=1).stamp()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1}, "--temperature -1: must be 0"),
        ({"top_p": 0}, "--top_p 0: must be more than 0"),
        ({"top_k": -2}, "--top_k -2"),
        ({"repetition_penalty": 0}, "--repetition_penalty 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Sampling(**settings)

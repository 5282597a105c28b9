"""Prompts of a simulation: lengths that the compiled programs take."""

import numpy as np
import pytest

from mindformers_glm32k.dryrun.simulator.scale_down import check_prompts, make_prompts
from mindformers_glm32k.errors import InputError


def config(**model):
    return {
        "model": {
            "model_config": {
                "use_past": True,
                "batch_size": 3,
                "seq_length": 64,
                "max_new_tokens": 16,
                "padded_vocab_size": 100,
                **model,
            }
        }
    }


@pytest.mark.parametrize(
    "count, batch, lengths", [(16, 3, [48, 48, 48]), (10, 3, [42, 54, 48]), (1, 2, [33, 63]), (4, 1, [48])]
)
def test_random_prompts_differ_in_length_where_there_is_room(count, batch, lengths):
    prompts = make_prompts(config(batch_size=batch), count)
    assert [len(ids) for ids in prompts] == lengths
    assert all(ids.dtype == np.int32 and ids.min() >= 3 and ids.max() < 100 for ids in prompts)
    assert check_prompts(prompts, config(batch_size=batch), count)[0] is not None


def test_given_prompts_become_int32():
    found = check_prompts([[5] * 40, np.full(56, 7), range(48)], config(), 8)
    assert [ids.dtype for ids in found] == [np.int32] * 3 and found[2][-1] == 47


@pytest.mark.parametrize(
    "lengths, count, words",
    [
        ([48, 48], 8, "2 prompts: 3 are answered together"),
        ([48, 48, 47], 8, "as long on average"),
        ([32, 48, 64], 8, "leave room for 8 tokens"),
        ([48, 48, 48], 17, "--execute 17: model_config.max_new_tokens is 16"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(lengths, count, words):
    with pytest.raises(InputError, match=words):
        check_prompts([[1] * length for length in lengths], config(), count)


def test_unknown_tokens_and_no_room_are_refused():
    with pytest.raises(InputError, match="outside of the vocabulary: model_config.padded_vocab_size=100"):
        check_prompts([[1] * 48, [1] * 48, [100] * 48], config(), 8)
    with pytest.raises(InputError, match="no room for a prompt"):
        make_prompts(config(max_new_tokens=64), 8)

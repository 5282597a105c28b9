"""Parameters sharded for ranks and gathered again."""

from types import SimpleNamespace

import numpy as np
import pytest

from mindformers_glm32k.dryrun.analysis.mindir import Spec
from mindformers_glm32k.dryrun.simulator import state
from mindformers_glm32k.dryrun.simulator.operators import Parameter
from mindformers_glm32k.weights.strategy import ShardSpec

NAME = "layers.0.dense.weight"
LAYOUT = {NAME: ShardSpec((2, 2), ((0,), ()), 2)}  # dp 2 x mp 2: rows over mp, and over dp by the optimizer


def ranks_of(whole):
    interpreters = []
    for rank in range(4):
        program = SimpleNamespace(
            parameters={
                "a": (NAME, Spec((2, 3), "float32", 4)),
                "b": (f"accu_grads.{NAME}", Spec((4, 3), "float32", 4)),
                "c": ("norm.weight", Spec((3,), "float32", 4)),
                "d": ("micro_step", Spec((1,), "int32", 4)),
            }
        )
        values = state.shard(program, rank, LAYOUT, whole, {"micro_step": np.array([rank], np.int32)})
        interpreters.append(
            SimpleNamespace(
                rank=rank, parameters={name: Parameter(name, value, str(value.dtype)) for name, value in values.items()}
            )
        )
    return interpreters


@pytest.fixture
def whole():
    return {NAME: np.arange(24, dtype=np.float32).reshape(8, 3), "norm.weight": np.ones(3, np.float32)}


def shapes(whole):
    return {name: value.shape for name, value in whole.items()}


def test_parts_and_back(whole):
    interpreters = ranks_of(whole)
    shards = [interpreter.parameters[NAME].value for interpreter in interpreters]
    assert len({shard.tobytes() for shard in shards}) == 4
    assert not interpreters[0].parameters[f"accu_grads.{NAME}"].value.any()
    assert interpreters[3].parameters["micro_step"].value[0] == 3
    gathered, unequal = state.gather(interpreters, [range(4)], [LAYOUT], shapes(whole))
    assert unequal == {}
    for name, value in whole.items():
        np.testing.assert_array_equal(gathered[name], value)


def test_copies_that_differ_are_named_with_rank_and_size(whole):
    interpreters = ranks_of(whole)
    interpreters[2].parameters["norm.weight"].value = np.array([1, 1.5, 1], np.float32)
    _, unequal = state.gather(interpreters, [range(4)], [LAYOUT], shapes(whole))
    assert unequal == {"norm.weight": ([0, 2], 0.5)}


def test_bfloat16_parameters_hold_values_of_bfloat16():
    program = SimpleNamespace(parameters={"a": ("norm.weight", Spec((2,), "bfloat16", 2))})
    values = state.shard(program, 0, {}, {"norm.weight": np.array([0.1, 1.0], np.float32)}, {})
    assert values["norm.weight"].tolist() == [0.10009765625, 1.0]


def test_a_parameter_that_is_nowhere_is_an_error():
    with pytest.raises(KeyError, match="norm.weight"):
        ranks_of({NAME: np.zeros((8, 3), np.float32)})


def test_random_weights_spare_counters_and_states():
    before = {
        NAME: np.zeros((64, 64), np.float16),
        "input_layernorm.weight": np.ones(64, np.float32),
        "adam_m.x.weight": np.zeros(4, np.float32),
        "scale_sense": np.array(65536, np.float32),
        "global_step": np.zeros(1, np.int32),
    }
    after = state.random_weights(before)
    assert 0.1 < after[NAME].std() < 0.15 and after[NAME].dtype == np.float16
    assert 0.9 < after["input_layernorm.weight"].mean() < 1.1
    for name in ("adam_m.x.weight", "scale_sense", "global_step"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(after[NAME], state.random_weights(before)[NAME])  # the same every time

"""Keys and values of the data sections."""

import argparse
import multiprocessing

import numpy as np
import pytest

from mindformers_glm32k import checks
from mindformers_glm32k.errors import InputError


def test_unknown_keys_come_with_the_nearest_known_one():
    checks.reject_unknown({"shuffle": 1}, ("shuffle", "seed"), "data_loader")
    with pytest.raises(InputError, match="data_loader: unknown key 'shufle', did you mean 'shuffle'?"):
        checks.reject_unknown({"shufle": 1}, ("shuffle", "seed"), "data_loader")


@pytest.mark.parametrize(
    "check",
    [
        lambda: checks.whole_number("8", "batch_size", 1),
        lambda: checks.whole_number(0, "batch_size", 1),
        lambda: checks.whole_number(True, "batch_size", 1),
        lambda: checks.whole_number(None, "batch_size", 1),
        lambda: checks.boolean("False", "batch_size"),
        lambda: checks.choice("a", "batch_size", ("b",)),
    ],
)
def test_wrong_values_are_named(check):
    with pytest.raises(InputError, match="batch_size"):
        check()


def test_right_values_come_back():
    assert checks.whole_number(8, "x", 1) == 8
    assert checks.boolean(False, "x") is False
    assert checks.choice("b", "x", ("a", "b")) == "b"


@pytest.mark.parametrize("value", [True, "1", None, 1.0, float("nan")])
def test_what_is_no_integer(value):
    assert not checks.is_int(value)


def test_integers_and_numbers_have_bounds():
    assert checks.is_int(np.int64(3)) and checks.is_int(-3) and checks.is_int(3, 3) and not checks.is_int(2, 3)
    assert checks.is_number(0.5) and checks.is_number(1, 1) and not checks.is_number(0.5, 1)
    assert not checks.is_number(True) and not checks.is_number("1") and not checks.is_number(float("nan"), 0)


def test_slips_and_strangers():
    assert checks.nearest("shufle", {"seed": 1, "shuffle": 2}) == "shuffle"
    assert checks.nearest("shfl", ("seed", "shuffle"), cutoff=0.8) is None
    assert checks.did_you_mean("wholly_other", ("seed", "shuffle")) == ""
    assert checks.unknown_keys(("sed", "seed", "xyz"), ("seed",)) == [
        "unknown key 'sed', did you mean 'seed'?",
        "unknown key 'xyz'",
    ]


@pytest.mark.parametrize(
    "text, value",
    [("True", True), ("true", True), ("1", True), ("False", False), ("no", False), ("OFF", False), ("on", True)],
)
def test_booleans_of_the_command_line(text, value):
    assert checks.true_or_false(text) is value
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' is neither True nor False"):
        checks.true_or_false("maybe")


def test_digits_are_no_booleans_of_a_yaml():
    assert checks.true_or_false("Yes", digits=False) is True
    with pytest.raises(argparse.ArgumentTypeError, match="'1' is neither True nor False"):
        checks.true_or_false("1", digits=False)


def test_no_more_workers_than_cores():
    assert checks.workers(1, "x") == 1
    assert checks.workers(10000, "x") == multiprocessing.cpu_count()
    with pytest.raises(InputError, match="num_parallel_workers: 0"):
        checks.workers(0, "num_parallel_workers")

"""Keys and values of the data sections."""

import argparse
import multiprocessing

import pytest

from mindformers_glm32k import checks as options
from mindformers_glm32k.errors import InputError


def test_unknown_keys_come_with_the_nearest_known_one():
    options.reject_unknown({"shuffle": 1}, ("shuffle", "seed"), "data_loader")
    with pytest.raises(InputError, match="data_loader: unknown key 'shufle', did you mean 'shuffle'?"):
        options.reject_unknown({"shufle": 1}, ("shuffle", "seed"), "data_loader")


@pytest.mark.parametrize(
    "check",
    [
        lambda: options.whole_number("8", "batch_size", 1),
        lambda: options.whole_number(0, "batch_size", 1),
        lambda: options.whole_number(True, "batch_size", 1),
        lambda: options.whole_number(None, "batch_size", 1),
        lambda: options.boolean("False", "batch_size"),
        lambda: options.choice("a", "batch_size", ("b",)),
    ],
)
def test_wrong_values_are_named(check):
    with pytest.raises(InputError, match="batch_size"):
        check()


def test_right_values_come_back():
    assert options.whole_number(8, "x", 1) == 8
    assert options.boolean(False, "x") is False
    assert options.choice("b", "x", ("a", "b")) == "b"


@pytest.mark.parametrize("text, value", [("True", True), ("true", True), ("1", True), ("False", False), ("no", False)])
def test_booleans_of_the_command_line(text, value):
    assert options.true_or_false(text) is value
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' is neither True nor False"):
        options.true_or_false("maybe")


def test_no_more_workers_than_cores():
    assert options.workers(1, "x") == 1
    assert options.workers(10000, "x") == multiprocessing.cpu_count()
    with pytest.raises(InputError, match="num_parallel_workers: 0"):
        options.workers(0, "num_parallel_workers")

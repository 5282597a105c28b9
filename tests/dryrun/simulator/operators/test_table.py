"""The table as a whole: every operator is tested, every primitive of a compiled program is in it."""

from importlib import import_module
from pathlib import Path

import pytest

from dryrun.simulator.operators.calling import TESTED, covers
from mindformers_glm32k.dryrun.analysis.mindir import read_program
from mindformers_glm32k.dryrun.simulator.interpreter import _MOVERS
from mindformers_glm32k.dryrun.simulator.operators import operator, table


def test_every_operator_has_a_test():
    for path in Path(__file__).parent.glob("test_*.py"):
        import_module(f"dryrun.simulator.operators.{path.stem}")
    assert set(table()) - TESTED == set()
    assert TESTED - set(table()) == set()


def test_every_operator_states_its_contract():
    shared = {entry.function.__doc__ for entry in table().values()}
    assert all(text and len(text) > 10 for text in shared)


def test_every_primitive_of_a_pipeline_is_known(pipeline):
    programs = list((pipeline / "programs").iterdir())
    assert len(programs) == 2
    for path in programs:
        program = read_program(path)
        used = {node.op for graph in (program.main, *program.graphs.values()) for node in graph.nodes}
        assert used - set(table()) - set(_MOVERS) - {"Constant", "call"} == set()


def test_a_name_enters_once():
    with pytest.raises(ValueError, match="operator MatMul is in the table twice"):
        operator("MatMul")(lambda call: None)


def test_a_claim_that_tests_nothing_fails():
    before = set(TESTED)
    try:

        @covers("MatMul")
        def empty():
            pass

        with pytest.raises(AssertionError, match="calls none of"):
            empty()
    finally:
        TESTED.intersection_update(before)

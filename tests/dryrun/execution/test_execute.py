"""Compiled programs executed: one device against the published model, four ranks against one device, and mistakes that are
found."""
import copy

import numpy as np
import pytest

from mindformers_glm32k.cli import main
from mindformers_glm32k.dryrun import execute
from mindformers_glm32k.dryrun.execution.network import NetworkError
from mindformers_glm32k.dryrun.execution.rows import random_rows
from mindformers_glm32k.dryrun.mindir import Node
from mindformers_glm32k.weights.shards import ParameterLayout

BETA = 0.9  # of the first moment, in the YAML
# places among the inputs of the attention kernels
MODE = {"FlashAttentionScore": 17, "FlashAttentionScoreGrad": 22}
MASK = {"FlashAttentionScore": 6, "FlashAttentionScoreGrad": 7}
NONE = Node("no_mask", "Constant", [])


@pytest.fixture(scope="module")
def rows():
    return random_rows(["input_ids", "labels"], (2, 64), 2, 1024)


@pytest.fixture(scope="module")
def reference_run(one_device, weights, rows):
    return one_device.run(weights, rows)


def compared(result, reference_run, case, programs=None):
    return execute.compare(result, reference_run, programs or case.programs, case.layout, case.config)


def changed(case, change, ranks=range(4)):
    """The case's programs after change(node) was called on each node of some ranks' programs."""
    programs = list(case.programs)
    for rank in ranks:
        programs[rank] = copy.copy(programs[rank])
        programs[rank].program = copy.deepcopy(programs[rank].program)
        program = programs[rank].program
        for graph in (program.main, *program.graphs.values()):
            for node in graph.nodes:
                change(node)
    return programs


def test_one_device_computes_the_published_loss_and_gradients(one_device, published, golden):
    ids = golden["input_ids"].astype(np.int32)
    result = one_device.run(published, {"input_ids": ids[None], "labels": golden["labels"][None]})
    loss, overflow, _, _, norm = result.outputs[0][0]
    assert not np.all(overflow)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)
    norms = {name[9:]: float(value) for name, value in golden.items() if name.startswith("gradnorm:")}
    total = np.sqrt(sum(value ** 2 for value in norms.values()))
    np.testing.assert_allclose(norm, total, rtol=1e-5)
    machine = result.machines[0]
    checked = 0
    for name, expected in norms.items():
        moment = machine.parameters.get(f"adam_m.{name_here(name)}")
        if moment is None:
            continue
        # the first moment after one step is (1 - beta) x the clipped gradient
        gradient = np.linalg.norm(moment.value.astype(np.float64)) / (1 - BETA) * max(norm.item(), 1.0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, err_msg=name)
        checked += 1
    assert checked >= 20


def name_here(name):
    """A Hugging Face name of the published checkpoint as MindFormers' parameter."""
    return name.replace("word_embeddings.weight", "embedding_weight")


def test_four_ranks_equal_one_device(four_ranks, weights, rows, reference_run):
    result = four_ranks.run(weights, rows)
    report = compared(result, reference_run, four_ranks)
    assert report["agrees"], report["problems"]
    assert report["largest_moment_difference_relative"] < 1e-5
    kinds = {item["kind"] for item in report["collectives"]}
    assert {"AllReduce", "AllGather", "ReduceScatter"} <= kinds
    losses = [step["loss"] for step in report["steps"]]
    assert len(losses) == 2 and abs(losses[0] - np.log(1024)) > 0.1  # not that of an even guess


def test_a_shard_on_the_wrong_axis_is_found(four_ranks, weights, rows, reference_run):
    name = "transformer.encoder.layers.0.self_attention.dense.weight"  # square: the wrong cut has the right shape
    programs = [copy.copy(rehearsed) for rehearsed in four_ranks.programs]
    for rehearsed in programs:
        right = rehearsed.layouts[name]
        wrong = ParameterLayout(right.dev_matrix, right.tensor_map[::-1], right.optimizer_parts)
        rehearsed.layouts = {**rehearsed.layouts, name: wrong}
        if wrong.slice_shape((64, 64)) != right.slice_shape((64, 64)):
            pytest.skip("the optimizer's cut makes the shapes differ")
    report = compared(four_ranks.run(weights, rows, programs), reference_run, four_ranks, programs)
    assert not report["agrees"] and any("loss" in problem for problem in report["problems"])


def test_a_missing_collective_on_all_ranks_is_found(four_ranks, weights, rows, reference_run):
    dropped = set()

    def drop(node):  # the same one on every rank: the first of the first attention's output projection
        if node.op == "AllReduce" and "layers/0" in node.scope and "Gradients" not in node.scope \
                and (not dropped or node.name in dropped):
            dropped.add(node.name)
            node.op, node.inputs = "Depend", [node.inputs[0], node.inputs[0]]

    programs = changed(four_ranks, drop)
    assert dropped
    report = compared(four_ranks.run(weights, rows, programs), reference_run, four_ranks, programs)
    assert not report["agrees"]
    assert report["problems"][0].startswith("step 1: loss is")


def test_a_collective_that_one_rank_leaves_out_is_found(four_ranks, weights, rows):
    dropped = []

    def drop(node):
        if node.op == "AllReduce" and not dropped:
            dropped.append(node)
            node.op, node.inputs = "Depend", [node.inputs[0], node.inputs[0]]

    with pytest.raises(NetworkError, match="deadlock|do not meet"):
        four_ranks.run(weights, rows, changed(four_ranks, drop, ranks=[1]))


def test_another_reduction_on_one_rank_is_found_with_its_place(four_ranks, weights, rows):
    def turn(node):
        if node.op == "AllReduce":
            node.attributes = {**node.attributes, "op": "max"}

    with pytest.raises(NetworkError, match=r"max.*\(rank \d at "):
        four_ranks.run(weights, rows, changed(four_ranks, turn, ranks=[3]))


def test_a_mask_that_leaks_is_found(four_ranks, weights, rows, reference_run):
    leaky = []

    def leak(node):
        if node.op == "FlashAttentionScore":
            leaky.append(node)

    changed_programs = changed(four_ranks, leak)
    for rehearsed in changed_programs:
        for graph in (rehearsed.program.main, *rehearsed.program.graphs.values()):
            constants = {node.name: node for node in graph.nodes if node.op == "Constant"}
            for node in graph.nodes:
                if node.op.startswith("FlashAttentionScore"):
                    mode = constants[node.inputs[MODE[node.op]]]
                    assert mode.value == 2
                    whole = copy.copy(mode)
                    whole.name, whole.value = f"{mode.name}_whole", 0
                    graph.nodes.insert(0, whole)
                    node.inputs[MODE[node.op]] = whole.name
                    node.inputs[MASK[node.op]] = NONE.name
            graph.nodes.insert(0, copy.copy(NONE))
    assert leaky
    report = compared(four_ranks.run(weights, rows, changed_programs), reference_run, four_ranks, changed_programs)
    assert not report["agrees"] and any("loss" in problem for problem in report["problems"])


@pytest.mark.parametrize("options, words", [
    (["--execute", "0"], "at least one step"),
    (["--execute", "2", "--quick"], "--execute and --quick do not go together"),
    (["--quick", "--keep_programs"], "--quick and --keep_programs do not go together"),
])
def test_options_that_say_nothing_together_are_refused(options, words, capsys):
    assert main(["dryrun", "--config", "any.yaml", *options]) == 2
    assert words in capsys.readouterr().err

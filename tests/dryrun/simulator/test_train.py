"""Compiled programs simulated: one device against the published model, four ranks against one device, and mistakes
that are found."""

import copy
import subprocess
import sys

import numpy as np
import pytest

from mindformers_glm32k.cli import main
from mindformers_glm32k.dryrun.analysis.mindir import Node
from mindformers_glm32k.dryrun.simulator import state, train
from mindformers_glm32k.dryrun.simulator.comparison import compare_parameters
from mindformers_glm32k.dryrun.simulator.network import NetworkError
from mindformers_glm32k.dryrun.simulator.train import random_sequences
from mindformers_glm32k.weights import merge, split
from mindformers_glm32k.weights.checkpoint import open_source
from mindformers_glm32k.weights.strategy import ShardSpec
from mindformers_glm32k.weights.tensors import same_bits

BETA = 0.9  # of the first moment, in the YAML
# places among the inputs of the attention kernels
MODE = {"FlashAttentionScore": 17, "FlashAttentionScoreGrad": 22}
MASK = {"FlashAttentionScore": 6, "FlashAttentionScoreGrad": 7}


@pytest.fixture(scope="module")
def sequences():
    return random_sequences(["input_ids", "labels"], (2, 64), 2, 1024)


@pytest.fixture(scope="module")
def reference_run(one_device, weights, sequences):
    return one_device.run(weights, sequences)


def compared(result, reference_run, case, programs=None):
    return train.compare(result, reference_run, programs or case.programs, case.layout, case.config)


def changed(case, change, ranks=range(4)):
    """The case's programs after change(node) was called on each node of some ranks' programs."""
    programs = list(case.programs)
    for rank in ranks:
        programs[rank] = copy.copy(programs[rank])
        programs[rank].phases = copy.deepcopy(programs[rank].phases)
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
    total = np.sqrt(sum(value**2 for value in norms.values()))
    np.testing.assert_allclose(norm, total, rtol=1e-5)
    interpreter = result.interpreters[0]
    checked = 0
    for name, expected in norms.items():
        moment = interpreter.parameters.get(f"adam_m.{name_here(name)}")
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


def test_four_ranks_equal_one_device(four_ranks, weights, sequences, reference_run):
    result = four_ranks.run(weights, sequences)
    report = compared(result, reference_run, four_ranks)
    assert report["agrees"], report["problems"]
    assert report["largest_moment_difference_relative"] < 1e-5
    kinds = {item["kind"] for item in report["collectives"]}
    assert {"AllReduce", "AllGather", "ReduceScatter"} <= kinds
    losses = [step["loss"] for step in report["steps"]]
    assert len(losses) == 2 and abs(losses[0] - np.log(1024)) > 0.1  # not that of an even guess


def transform_ckpt(folder, source, target, **strategy):
    """The host's own tool, unchanged: folder/source -> folder/target, by src_ckpt_strategy or dst_ckpt_strategy."""
    options = {"src_ckpt_dir": folder / source, "dst_ckpt_dir": folder / target, "prefix": "whole_", **strategy}
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "mindformers.tools.transform_ckpt", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_upstreams_transform_ckpt_merges_what_the_ranks_leave(four_ranks, weights, sequences, reference_run, tmp_path):
    for interpreter in four_ranks.run(weights, sequences).interpreters:
        state.save(interpreter, tmp_path / "checkpoint", 2)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("checkpoint/*/*"))
    assert names == [f"checkpoint/rank_{rank}/glm32k_rank_{rank}-1_2.ckpt" for rank in range(4)]
    transform_ckpt(tmp_path, "checkpoint", "merged", src_ckpt_strategy=four_ranks.strategy)
    merged = open_source(tmp_path / "merged" / "rank_0" / "whole_0.ckpt").tensors
    one = reference_run.interpreters[0].parameters
    compared_names = [name for name in one if "transformer." in name]
    assert len(compared_names) > 60  # weights and both moments
    whole = {name: merged[name].load() for name in compared_names}
    differences = compare_parameters(
        whole, {name: parameter.value for name, parameter in one.items()}, reference_run.noise
    )
    assert differences[0].relative < 1e-5, differences[0]


def test_upstreams_transform_ckpt_and_ours_merge_and_split_alike(four_ranks, weights, sequences, tmp_path):
    ranks = four_ranks.run(weights, sequences).interpreters
    for interpreter in ranks:
        state.save(interpreter, tmp_path / "checkpoint", 2)
    transform_ckpt(tmp_path, "checkpoint", "merged", src_ckpt_strategy=four_ranks.strategy)
    merge(tmp_path / "checkpoint", tmp_path / "ours.ckpt", four_ranks.strategy, optimizer_states=True)
    theirs = open_source(tmp_path / "merged" / "rank_0" / "whole_0.ckpt").tensors
    ours = open_source(tmp_path / "ours.ckpt").tensors
    sharded = [name for name in ours if "transformer." in name]
    assert len(sharded) > 60
    assert all(same_bits(ours[name].load(), theirs[name].load()) for name in sharded)

    transform_ckpt(tmp_path, "merged", "split", dst_ckpt_strategy=four_ranks.strategy)
    split(tmp_path / "ours.ckpt", tmp_path / "ours", four_ranks.strategy)
    for rank in range(4):
        (before,), (theirs,), (ours,) = (
            (tmp_path / folder / f"rank_{rank}").glob("*.ckpt") for folder in ("checkpoint", "split", "ours")
        )
        before, theirs, ours = (open_source(path).tensors for path in (before, theirs, ours))
        sharded = [name for name in before if "transformer." in name]
        assert len(sharded) >= 30
        for name in sharded:
            values = before[name].load()
            assert same_bits(theirs[name].load(), values) and same_bits(ours[name].load(), values), (rank, name)


def test_an_mlp_in_chunks_equals_the_whole(two_ranks_in_chunks, weights, sequences, reference_run):
    case = two_ranks_in_chunks
    program = case.programs[0].program
    gates = sum(node.op == "SiLU" for graph in (program.main, *program.graphs.values()) for node in graph.nodes)
    chunks, layers = 3, case.config["model"]["model_config"]["num_layers"]
    assert gates == 2 * chunks * layers  # forward, and recomputed with the layer
    report = compared(case.run(weights, sequences), reference_run, case)
    assert report["agrees"], report["problems"]


def test_a_shard_on_the_wrong_axis_is_found(four_ranks, weights, sequences, reference_run):
    name = "transformer.encoder.layers.0.self_attention.dense.weight"
    right = four_ranks.programs[0].layouts[name]
    assert right.shard_shape((64, 64)) == (32, 32)  # columns over mp, rows over dp by the optimizer
    wrong = ShardSpec((2, 2), ((0,), (1,)))  # rows over mp, columns over dp
    programs = [copy.copy(compiled) for compiled in four_ranks.programs]
    for compiled in programs:
        compiled.layouts = {**compiled.layouts, name: wrong}
    report = compared(four_ranks.run(weights, sequences, programs), reference_run, four_ranks, programs)
    assert not report["agrees"] and report["problems"][0].startswith("step 1: loss is")


def test_a_missing_collective_on_all_ranks_is_found(four_ranks, weights, sequences, reference_run):
    dropped = []
    programs = changed(four_ranks, lambda node: None)
    for compiled in programs:
        node = next(
            node
            for graph in (compiled.program.main, *compiled.program.graphs.values())
            for node in graph.nodes
            if node.op == "AllReduce" and "encoder" in node.scope and "Gradients" not in node.scope
        )
        node.op, node.inputs = "Depend", [node.inputs[0], node.inputs[0]]
        dropped.append(node.scope)
    assert len(set(dropped)) == 1
    report = compared(four_ranks.run(weights, sequences, programs), reference_run, four_ranks, programs)
    assert not report["agrees"]
    assert report["problems"][0].startswith("step 1: loss is")


def test_a_collective_that_one_rank_leaves_out_is_found(four_ranks, weights, sequences):
    dropped = []

    def drop(node):
        if node.op == "AllReduce" and not dropped:
            dropped.append(node)
            node.op, node.inputs = "Depend", [node.inputs[0], node.inputs[0]]

    with pytest.raises(NetworkError, match="deadlock|differ in their collective"):
        four_ranks.run(weights, sequences, changed(four_ranks, drop, ranks=[1]))


def test_another_reduction_on_one_rank_is_found_with_its_place(four_ranks, weights, sequences):
    def turn(node):
        if node.op == "AllReduce":
            node.attributes = {**node.attributes, "op": "max"}

    with pytest.raises(NetworkError, match=r"max.*\(rank \d at "):
        four_ranks.run(weights, sequences, changed(four_ranks, turn, ranks=[3]))


def test_a_mask_that_leaks_is_found(four_ranks, weights, sequences, reference_run):
    programs = changed(four_ranks, lambda node: None)
    for compiled in programs:
        for graph in (compiled.program.main, *compiled.program.graphs.values()):
            for node in graph.nodes:
                if node.op.startswith("FlashAttentionScore"):
                    node.inputs[MODE[node.op]], node.inputs[MASK[node.op]] = "mode_0", "no_mask"
        compiled.program.main.nodes[:0] = [Node("mode_0", "Constant", [], value=0), Node("no_mask", "Constant", [])]
    report = compared(four_ranks.run(weights, sequences, programs), reference_run, four_ranks, programs)
    assert not report["agrees"] and report["problems"][0].startswith("step 1: loss is")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--execute", "0"], "at least one step"),
        (["--execute", "2", "--quick"], "--execute and --quick do not go together"),
        (["--quick", "--keep_programs"], "--quick and --keep_programs do not go together"),
    ],
)
def test_options_that_say_nothing_together_are_refused(options, words, capsys):
    assert main(["dryrun", "--config", "any.yaml", *options]) == 2
    assert words in capsys.readouterr().err

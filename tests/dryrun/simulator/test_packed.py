"""Packed sequences in the programs for NPUs: flash attention's variable-length form, simulated."""

import json

import mindspore as ms
import numpy as np
import pytest

from dryrun.simulator.conftest import Case
from dryrun.tiny import CONFIG, run_command
from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration
from mindformers_glm32k.data.encode import IGNORED, EncodedSample
from mindformers_glm32k.data.packing import COLUMNS, packed_sequence
from mindformers_glm32k.dryrun.analysis.analyze import is_square
from mindformers_glm32k.dryrun.analysis.trace import trace_program
from mindformers_glm32k.dryrun.simulator import state, train

ROWS, LENGTH, PLACES = 4, 80, 8  # no other size of the model is LENGTH
PACKED = {
    "train_dataset__packing": True,
    "model__model_config__seq_length": LENGTH,
    "model__model_config__documents_per_row": PLACES - 1,
    "train_dataset__max_source_length": 56,
    "model__model_config__num_layers": 2,
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """All sequences on one device."""
    return Case(
        tmp_path_factory.mktemp("packed_one"),
        use_parallel=False,
        parallel_config__data_parallel=1,
        runner_config__batch_size=ROWS,
        train_dataset__batch_size=ROWS,
        **PACKED,
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The same on two devices, two sequences on each."""
    return Case(
        tmp_path_factory.mktemp("packed_ranks"),
        parallel_config__data_parallel=2,
        runner_config__batch_size=ROWS // 2,
        **PACKED,
    )


@pytest.fixture(scope="module")
def weights(one):
    return state.random_weights(one.programs[0].state)


def documents(lengths, seed):
    """Documents of random tokens, each with a prompt."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        ids = rng.integers(3, 1024, length).astype(np.int32)
        labels = np.append(ids[1:], IGNORED).astype(np.int32)
        labels[: length // 3] = IGNORED
        found.append(EncodedSample(ids, labels, length, length, length // 3))
    return found


def step_of(*sequences):
    """Columns of one step, of the documents of each sequence."""
    arrays = zip(*(packed_sequence(each, LENGTH, 0) for each in sequences))
    return {name: np.stack(values)[None] for name, values in zip(COLUMNS, arrays)}


@pytest.fixture(scope="module")
def sequences():
    """Rows with one to seven documents, full ones and others."""
    return step_of(
        documents((30, 50), 1), documents((17, 1, 33), 2), documents((80,), 3), documents((20, 10, 9, 11, 5, 4, 21), 4)
    )


@pytest.fixture(scope="module")
def whole(one, weights, sequences):
    """The sequences on one device."""
    return one.run(weights, sequences)


def loss_of(result):
    return float(np.ravel(result.outputs[0][0][0])[0])


def kernels_of(case):
    return [
        node
        for compiled in case.programs
        for graph in (compiled.program.main, *compiled.program.graphs.values())
        for node in graph.nodes
        if node.op.startswith("FlashAttentionScore")
    ]


def test_a_layout_equals_one_device(ranks, weights, sequences, whole):
    report = train.compare(ranks.run(weights, sequences), whole, ranks.programs, ranks.layout, ranks.config)
    assert report["agrees"], report["problems"]
    assert report["largest_moment_difference_relative"] < 1e-5


def test_documents_that_end_elsewhere_are_found(ranks, weights, sequences, whole):
    shifted = {
        **sequences,
        "document_ids": np.concatenate([sequences["document_ids"][..., :1], sequences["document_ids"][..., :-1]], -1),
    }
    report = train.compare(ranks.run(weights, shifted), whole, ranks.programs, ranks.layout, ranks.config)
    assert not report["agrees"] and report["problems"][0].startswith("step 1: loss is")


def test_a_document_beside_others_counts_as_it_does_alone(one, weights):
    """The same documents in two sequences or each in its own: the same loss and the same gradient."""
    first, second, third, fourth = documents((30, 50, 42, 17), 5)
    together = one.run(weights, step_of((first, second), (third, fourth), (), ()))
    alone = one.run(weights, step_of((first,), (second,), (third,), (fourth,)))
    assert loss_of(together) == pytest.approx(loss_of(alone), rel=1e-6)
    norms = [float(np.ravel(result.outputs[0][0][4])[0]) for result in (together, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    merged = step_of((first, second), (third, fourth), (), ())
    merged["document_ids"][merged["document_ids"] == 1] = 0  # the second of a sequence sees the first
    assert abs(loss_of(one.run(weights, merged)) - loss_of(alone)) > 1e-3


def test_the_cpu_computes_the_same_loss(one, weights, sequences, whole):
    fields = {key: value for key, value in one.config["model"]["model_config"].items() if value is not None}
    network = GLM32KForConditionalGeneration(GLM32KConfig(**{**fields, "cells": "portable"}))
    names = {parameter.name: parameter for parameter in network.get_parameters()}
    assert set(names) <= set(weights)
    for name, parameter in names.items():
        parameter.set_data(ms.Tensor(weights[name].astype(np.float32)))
    network.set_train(True)
    loss = network(*(ms.Tensor(np.ascontiguousarray(sequences[name][0])) for name in COLUMNS))
    assert loss_of(whole) == pytest.approx(loss.asnumpy().item(), rel=1e-5)


def test_no_tensor_grows_with_the_square_of_the_length(one, ranks):
    for compiled in (*one.programs, *ranks.programs):
        trace = trace_program(compiled.program)
        buffers = trace.activations + trace.constants + trace.inputs
        assert any(LENGTH in buffer.spec.shape for buffer in buffers)
        assert not [buffer for buffer in buffers if is_square(buffer.spec.shape, {LENGTH})]


def test_the_kernel_gets_all_tokens_behind_each_other(one, ranks):
    assert {node.output[3].shape for node in kernels_of(one) if node.op == "FlashAttentionScore"} == {
        (4 * LENGTH, 4, 16)
    }
    assert {node.output[3].shape for node in kernels_of(ranks) if node.op == "FlashAttentionScore"} == {
        (2 * LENGTH, 4, 16)
    }


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    "yaml, layout",
    [
        ("finetune_glm32k", {"parallel_config__pipeline_stage": 2, "parallel_config__micro_batch_num": 2}),
        (
            "finetune_glm32k_cp8",
            {
                "parallel_config__data_parallel": 2,
                "parallel_config__context_parallel": 2,
                "parallel_config__ulysses_degree_in_cp": 2,
            },
        ),
        ("finetune_glm32k_cp8", {}),
        ("finetune_glm32k_mp4", {"parallel_config__micro_batch_num": 2}),
        ("finetune_glm32k_fast", {}),
    ],
    ids=["dp 2 x pp 2", "dp 2 x cp 2 (Ulysses)", "cp 8 (Ulysses)", "mp 4 x pp 2", "dp 8"],
)
def test_every_kind_of_layout_equals_one_device(tmp_path, yaml, layout):
    result = run_command(
        "dryrun",
        "--execute",
        "3",
        "--output_dir",
        str(tmp_path),
        sizes={},
        config=CONFIG.with_name(f"{yaml}.yaml"),
        train_dataset__packing=True,
        **layout,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "execution.json").read_text())
    assert report["agrees"] and len(report["steps"]) == 3
    assert report["largest_moment_difference_relative"] < 1e-5

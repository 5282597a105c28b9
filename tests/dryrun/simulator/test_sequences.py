"""Sequences that a simulation trains on."""

from types import SimpleNamespace

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Spec
from mindformers_glm32k.dryrun.simulator.train import random_sequences, rank_inputs
from mindformers_glm32k.parallel import ParallelLayout

COLUMNS = ["input_ids", "labels", "position_ids", "document_ids", "input_mask"]


def test_random_sequences_have_different_numbers_of_labels():
    sequences = random_sequences(COLUMNS, (8, 64), 2, 1024)
    assert {name: value.shape for name, value in sequences.items()} == {name: (2, 8, 64) for name in COLUMNS}
    counts = (sequences["labels"] != -100).sum(-1)
    assert len(set(counts.reshape(-1))) > 4 and counts.min() >= 3
    learned = sequences["labels"][:, :, :-1] != -100
    np.testing.assert_array_equal(sequences["labels"][:, :, :-1][learned], sequences["input_ids"][:, :, 1:][learned])
    assert sequences["input_ids"].min() >= 3 and sequences["input_ids"].max() < 1024
    np.testing.assert_array_equal(sequences["input_mask"] > 0, sequences["labels"] != -100)
    assert sequences["document_ids"].max() == 1 and sequences["position_ids"].max() == 31


def compiled(batch):
    return SimpleNamespace(columns=["input_ids"], program=SimpleNamespace(inputs={"a": Spec((batch, 64), "int32", 4)}))


def test_the_whole_batch_or_a_data_parallel_part():
    layout = ParallelLayout(2, 2, 1, 2, 4, 8, 64, 4)
    sequences = random_sequences(["input_ids"], (8, 64), 1, 1024)
    np.testing.assert_array_equal(rank_inputs(compiled(8), sequences, 0, 3, layout)[0], sequences["input_ids"][0])
    for rank, part in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (7, 1)):
        np.testing.assert_array_equal(
            rank_inputs(compiled(4), sequences, 0, rank, layout)[0], sequences["input_ids"][0, 4 * part : 4 * part + 4]
        )

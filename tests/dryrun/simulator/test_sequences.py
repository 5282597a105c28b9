"""Rows for a rehearsal."""

from types import SimpleNamespace

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Spec
from mindformers_glm32k.dryrun.simulator.rows import input_arrays, random_rows
from mindformers_glm32k.parallel import ParallelLayout

COLUMNS = ["input_ids", "labels", "position_ids", "document_ids", "input_mask"]


def test_random_rows_have_different_numbers_of_labels():
    rows = random_rows(COLUMNS, (8, 64), 2, 1024)
    assert {name: value.shape for name, value in rows.items()} == {name: (2, 8, 64) for name in COLUMNS}
    counts = (rows["labels"] != -100).sum(-1)
    assert len(set(counts.reshape(-1))) > 4 and counts.min() >= 3
    learned = rows["labels"][:, :, :-1] != -100
    np.testing.assert_array_equal(rows["labels"][:, :, :-1][learned], rows["input_ids"][:, :, 1:][learned])
    assert rows["input_ids"].min() >= 3 and rows["input_ids"].max() < 1024
    np.testing.assert_array_equal(rows["input_mask"] > 0, rows["labels"] != -100)
    assert rows["document_ids"].max() == 1 and rows["position_ids"].max() == 31


def rehearsed(rows):
    return SimpleNamespace(columns=["input_ids"], program=SimpleNamespace(inputs={"a": Spec((rows, 64), "int32", 4)}))


def test_the_whole_batch_or_a_data_parallel_part():
    layout = ParallelLayout(2, 2, 1, 2, 4, 8, 64, 4)
    rows = random_rows(["input_ids"], (8, 64), 1, 1024)
    np.testing.assert_array_equal(input_arrays(rehearsed(8), rows, 0, 3, layout)[0], rows["input_ids"][0])
    for rank, part in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (7, 1)):
        np.testing.assert_array_equal(
            input_arrays(rehearsed(4), rows, 0, rank, layout)[0], rows["input_ids"][0, 4 * part : 4 * part + 4]
        )

"""Packed data against the places of the program for NPUs."""

import pytest
from mindformers.tools.register import MindFormerConfig

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.preflight import check_packing


def config(section="train_dataset", batch_size=1, wanted=None, packing=True, **model):
    dataset = {"packing": packing, **({"documents_per_row": wanted} if wanted else {})}
    return MindFormerConfig(
        **{
            "model": {"model_config": {"seq_length": 64, "use_flash_attention": True, "cells": "ascend", **model}},
            "runner_config": {"batch_size": batch_size},
            section: dataset,
            f"{section}_task": {"dataset_config": dict(dataset)},
        }
    )


@pytest.mark.parametrize("section", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    "model, limit",
    [({}, 127), ({"documents_per_row": 31}, 31), ({"cells": "portable"}, None), ({"use_flash_attention": False}, None)],
)
def test_sequences_get_no_more_documents_than_the_program_has_places_for(section, model, limit):
    merged = config(section, **model)
    check_packing(merged, [section])
    assert merged[section].get("documents_per_row") == limit
    assert merged[f"{section}_task"].dataset_config.get("documents_per_row") == limit


def test_what_is_not_packed_is_left_alone():
    merged = config(packing=False, attention_dropout=0.1)
    check_packing(merged, ["train_dataset", "eval_dataset"])
    assert "documents_per_row" not in merged.train_dataset


def test_a_lower_limit_stays():
    merged = config(wanted=16)
    check_packing(merged, ["train_dataset"])
    assert merged.train_dataset.documents_per_row == 16


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"wanted": 200},
            "train_dataset.documents_per_row=200: the program has places for model_config.documents_per_row=127",
        ),
        ({"attention_dropout": 0.1}, "model_config.attention_dropout=0.1: must be 0"),
        ({"batch_size": 9}, ".*runner_config.batch_size=9 sequences .* 112 is the most"),
    ],
)
def test_what_cannot_work_is_refused(values, words):
    with pytest.raises(InputError, match=f"^packing: {words}"):
        check_packing(config(**values), ["train_dataset"])

"""Prediction with a cache: prefill and decode, on one NPU and cut over two."""

import json

import pytest

from dryrun.tiny import CONFIG, FFN, GROUPS, HEADS, HIDDEN, LAYERS, LENGTH, SIZE, VOCABULARY, run_dryrun

BLOCKS, ANSWER = 16, 8
PROMPT = LENGTH - ANSWER
OVERRIDES = {"model__model_config__num_blocks": BLOCKS, "model__model_config__max_new_tokens": ANSWER}
HALF = 2  # bytes
CACHE = 2 * LAYERS * BLOCKS * 16 * GROUPS * SIZE * HALF  # block_size 16
PRODUCTS = LAYERS * ((HEADS + 2 * GROUPS) * SIZE * HIDDEN + HIDDEN * HIDDEN + 3 * FFN * HIDDEN)


def predict(output, **overrides):
    result = run_dryrun(output, config=CONFIG.with_name("predict_glm32k.yaml"), **OVERRIDES, **overrides)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The report of one NPU."""
    return predict(tmp_path_factory.mktemp("predict"))


def test_both_programs_are_reported(one):
    assert [(program["phase"], program["rank"]) for program in one["programs"]] == [("prefill", 0), ("increment", 0)]
    assert one["run_mode"] == "predict" and one["estimate"] is None
    for program in one["programs"]:
        assert program["doubts"] == [] and program["collectives"] == []
        assert program["cache_bytes"] == CACHE
        assert program["compile_seconds"] > 0


def test_work_is_that_of_the_longest_prompt_and_of_one_token(one):
    prefill, increment = one["programs"]
    head = 2 * VOCABULARY * HIDDEN  # the last token's logits alone
    assert prefill["flops_by_part"]["matmul_forward"] == 2 * PROMPT * PRODUCTS + head
    assert increment["flops_by_part"]["matmul_forward"] == 2 * PRODUCTS + head
    assert prefill["flops_by_part"]["attention_forward"] == 4 * PROMPT * PROMPT * HIDDEN * LAYERS
    assert increment["flops_by_part"]["attention_forward"] == 4 * LENGTH * HIDDEN * LAYERS
    assert prefill["activation_peak_bytes"] > 4 * increment["activation_peak_bytes"]


def test_over_two_npus_each_holds_half_of_the_cache(one, tmp_path):
    two = predict(tmp_path, use_parallel=True, parallel_config__model_parallel=2)
    assert two["layout"] == "mp 2"
    assert (tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt").stat().st_size > 0
    for program, whole in zip(two["programs"], one["programs"]):
        assert program["phase"] == whole["phase"]
        assert program["cache_bytes"] == CACHE // 2
        assert 0.45 < program["parameter_bytes"] / whole["parameter_bytes"] < 0.9  # the embedding is whole
        assert {tuple(item["group_ranks"]) for item in program["collectives"]} == {(0, 1)}
        reduced = [
            item for item in program["collectives"] if item["kind"] == "AllReduce" and item["dtype"] == "float16"
        ]
        assert sum(item["count"] for item in reduced) == 2 * LAYERS  # behind attention and MLP

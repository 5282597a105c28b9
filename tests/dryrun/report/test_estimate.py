"""The roofline by hand on round numbers."""

import pytest

from mindformers_glm32k.dryrun.report.estimate import PARTS, Device, estimate
from mindformers_glm32k.errors import InputError

DEVICE = Device(
    "test", {"float16": 100.0, "float32": 25.0}, memory=10.0, link=1.0, network=0.5, start=0.0, per_machine=8
)


def program(stage, matmul=0, attention=0, moved=0, collectives=()):
    return {
        "rank": stage,
        "stage": stage,
        "work": {"matmul_flops": {"float16": matmul}, "attention_flops": {"float16": attention}, "vector_bytes": moved},
        "collectives": [
            {"kind": kind, "group_ranks": ranks, "bytes": size, "count": 1} for kind, ranks, size in collectives
        ],
    }


def report(*programs, stages=None, micro_batches=1, **sizes):
    stages = stages or len(programs)
    return {
        "config": "x.yaml",
        "world_size": stages,
        "tokens_per_step": 1200,
        "layout_sizes": {"stages": stages, "micro_batches": micro_batches, **sizes},
        "programs": list(programs),
    }


def test_parts_of_one_device():
    found = estimate(report(program(0, 100, 50, 30, [("AllGather", (0, 1), 8)])), DEVICE, 0.5)
    assert found["parts"] == {"matmul": 2, "attention": 1, "vector": 3, "communication": 4, "bubble": 0}
    assert found["step_seconds"] == 10
    assert found["tokens_per_second_per_device"] == 120
    assert tuple(found["parts"]) == PARTS


def test_products_in_float32_run_at_their_own_peak():
    slow = program(0)
    slow["work"]["matmul_flops"] = {"float16": 100, "float32": 100}
    assert estimate(report(slow), DEVICE, 1.0)["parts"]["matmul"] == 1 + 4


def test_bubble_of_stages_that_are_alike():
    found = estimate(report(*(program(stage, 1600) for stage in range(4)), micro_batches=16), DEVICE, 1.0)
    assert found["step_seconds"] == pytest.approx(16 * (16 + 4 - 1) / 16)
    assert sum(found["parts"].values()) == pytest.approx(found["step_seconds"])


def test_virtual_stages_divide_the_bubble():
    programs = [program(stage, 1600) for stage in range(4)]
    plain, interleaved = (
        estimate(report(*programs, micro_batches=16, interleave=parts), DEVICE, 1.0)["parts"]["bubble"]
        for parts in (1, 2)
    )
    assert plain == 3 and interleaved == 1.5


def test_the_slowest_stage_sets_the_pace():
    found = estimate(report(program(0, 400), program(1, 800), micro_batches=4), DEVICE, 1.0)
    assert found["slowest_stage"] == 1
    assert found["step_seconds"] == 8 + 4 / 4  # its own work, and one micro batch through the other stage
    assert found["tokens_per_second_per_device"] == pytest.approx(1200 / 2 / 9)


def test_of_several_ranks_of_a_stage_the_slowest_counts():
    found = estimate(report(program(0, 100), program(0, 300), stages=1), DEVICE, 1.0)
    assert found["step_seconds"] == 3


def test_a_missing_stage_is_named():
    with pytest.raises(InputError, match="x.yaml.*stage 1.*--rank stages"):
        estimate(report(program(0, 1), stages=2), DEVICE)

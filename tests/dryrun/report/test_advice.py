"""Every warning is raised by what it is about, with its fix, and by nothing else."""

import copy

import pytest
import yaml

from dryrun.tiny import CONFIG
from mindformers_glm32k.dryrun.analysis.analyze import is_square
from mindformers_glm32k.dryrun.report.advice import GIB, MIB, device_memory, warnings_of


@pytest.fixture
def config():
    """The shipped fine-tuning configuration: dp 2 x pp 4, float16, 59GB."""
    return yaml.safe_load(CONFIG.read_text())


def program(stage=0, **more):
    return {
        "rank": 2 * stage,
        "stage": stage,
        "phase": "train",
        "total_bytes": 30 * GIB,
        "flops": 10**15,
        "collectives": [],
        "square_tensors": [],
        "large_constants": [],
        "doubts": [],
        **more,
    }


def collective(kind="AllGather", ranks=(0, 1), dtype="float16", size=10**9, count=10, purpose=None, part="forward"):
    return {
        "kind": kind,
        "group_ranks": list(ranks),
        "dtype": dtype,
        "bytes": size,
        "count": count,
        "purpose": purpose or kind,
        "part": part,
    }


def working(*flops):
    """Programs of stages with so many PFLOPs."""
    return [program(stage, flops=count * 10**15) for stage, count in enumerate(flops)]


def found(config, *programs):
    return [(item["kind"], item["what"], item["fix"]) for item in warnings_of({"programs": list(programs)}, config)]


def test_nothing_to_warn_of(config):
    quiet = [collective(), collective("Send", (0, 2)), collective("AllReduce", dtype="float32", size=400, count=100)]
    assert found(config, *(program(stage, collectives=quiet) for stage in range(4))) == []


def test_memory_above_what_the_yaml_allows(config):
    ((kind, what, fix),) = found(config, program(), program(3, total_bytes=60 * GIB))
    assert kind == "memory" and "stage 3: 60.0 GiB" in what and "max_device_memory allows 59.0" in what
    assert "pipeline_stage" in fix
    ((_, what, fix),) = found(config, program(phase="prefill", total_bytes=60 * GIB))
    assert "prefill of stage 0" in what and "num_blocks" in fix
    orders = {"bfs": 58 * GIB, "dfs": 61 * GIB}
    assert found(config, program(total_bytes=60 * GIB, total_bytes_by_order=orders)) == []
    assert found(config, program(total_bytes=50 * GIB, total_bytes_by_order={"bfs": 61 * GIB})) == []
    ((_, what, _),) = found(config, program(total_bytes=62 * GIB, total_bytes_by_order={"bfs": 61 * GIB}))
    assert "61.0 GiB are needed" in what
    config["context"]["max_device_memory"] = None
    assert found(config, program(total_bytes=600 * GIB)) == []


@pytest.mark.parametrize(
    "text, size", [("59GB", 59 * GIB), ("1.5 GB", 3 * GIB // 2), ("512MB", 512 * MIB), ("all", None), (None, None)]
)
def test_device_memory(text, size):
    assert device_memory({"context": {"max_device_memory": text}}) == size


def test_tensors_of_the_length_squared(config):
    mask = {"shape": [1, 1, 32768, 32768], "dtype": "uint8", "bytes": GIB, "source": "model.py:7 mask", "count": 1}
    ((kind, what, fix),) = found(config, program(square_tensors=[mask]), program(1, square_tensors=[mask]))
    assert kind == "square" and "stages 0, 1" in what and "1.00 GiB" in what and "model.py:7" in what
    assert "use_flash_attention" in fix


@pytest.mark.parametrize(
    "shape, is_one",
    [
        ((32768, 32768), True),
        ((1, 32, 32768, 32768), True),
        ((4096, 32768), True),
        ((2048, 2048), False),
        ((32768, 4096), True),
        ((32768, 13696), False),
        ((32768,), False),
        ((32768, 1), False),
    ],
)
def test_what_counts_as_square(shape, is_one):
    assert is_square(shape, lengths=(32768, 4096)) is is_one


def test_a_hidden_size_equal_to_the_length_is_not_taken_for_it():
    assert not is_square((4096, 4096), (4096,), widths=(4096, 13696))
    assert is_square((1, 32, 4096, 4096), (4096,), widths=(4096, 13696))


def test_constants(config):
    table = {"shape": [32768, 1024], "dtype": "float32", "bytes": 128 * MIB, "source": "constant", "count": 1}
    ((kind, what, _),) = found(config, program(large_constants=[table]))
    assert kind == "constant" and "128 MiB" in what


def test_communication_wider_than_the_compute(config):
    boundary = [collective("Send", (0, 2), "float32"), collective("Receive", (0, 2), "float32", part="backward")]
    ((kind, what, fix),) = found(config, program(0, collectives=boundary), program(1, collectives=boundary))
    assert kind == "wide" and "stages 0, 1: Send and Receive between stages move 4.00 GB" in what and "40 calls" in what
    assert "residual_dtype: float16" in fix
    ((_, what, _),) = found(
        config, program(collectives=[collective("AllReduce", dtype="float32", purpose="redistribution_op_123456789")])
    )
    assert "AllReduce (redistribution_op) of the forward" in what
    config["model"]["model_config"]["compute_dtype"] = "float32"
    assert found(config, program(collectives=[collective("AllReduce", dtype="float32")])) == []


def test_collectives_of_one_rank(config):
    ((kind, what, fix),) = found(
        config,
        program(collectives=[collective(ranks=(0,), count=96, dtype="float32", purpose="recompute_slice_allgather")]),
    )
    assert kind == "alone" and "96 AllGather (recompute_slice_allgather)" in what and "1.00 GB" in what
    assert "recompute_slice_activation: False" in fix


def test_unbalanced_stages(config):
    uneven = copy.deepcopy(config)
    uneven["model"]["model_config"]["offset"] = [1, 0, 0, -1]
    ((kind, what, fix),) = found(uneven, *working(8, 6, 6, 5))
    assert kind == "balance" and "stage 0, which holds 8 of 28 layers, has 1.28 times" in what and "offset" in fix
    assert found(config, *working(10, 10, 10, 11)) == []


def test_what_could_not_be_read_is_said(config):
    ((kind, what, _),) = found(config, program(doubts=["a loop is counted once"]))
    assert kind == "incomplete" and "a loop" in what

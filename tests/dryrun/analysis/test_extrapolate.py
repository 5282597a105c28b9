"""Extrapolation from shallow programs, on figures that are linear in the layers."""

import pytest

from mindformers_glm32k.dryrun.analysis.extrapolate import extrapolate, layers_of_stages
from mindformers_glm32k.errors import InputError

SIZES = {"seq_length": 64, "num_attention_heads": 4, "multi_query_group_num": 2}
INTERLEAVED = {"parallel": {"pipeline_config": {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}}}


def config(**model):
    return {
        "use_parallel": True,
        "parallel_config": {"pipeline_stage": 4},
        "recompute_config": {"recompute": True},
        "model": {"model_config": {"num_layers": 28, **SIZES, **model}},
    }


def program(layers):
    return {
        "rank": 2,
        "stage": 1,
        "compile_seconds": 10.5 * layers,
        "peak_rss_bytes": 1000 * layers,
        "activation_peak_bytes": 100 + 7 * layers,
        "flops": 3 + 11 * layers,
        "peak_at": f"line {layers}",
        "work": {"matmul_flops": {"float16": 5 * layers, **({"float32": 8} if layers > 2 else {})}},
        "collectives": [
            {
                "kind": "AllGather",
                "group_ranks": [0, 1],
                "dtype": "float16",
                "purpose": "weights",
                "part": "forward",
                "bytes": 20 * layers + 6,
                "count": layers + 1,
            },
            {
                "kind": "Send",
                "group_ranks": [0, 2],
                "dtype": "float16",
                "purpose": "Send",
                "part": "forward",
                "bytes": 512,
                "count": 16,
            },
        ],
        "largest_tensors": [{"bytes": layers}],
        "doubts": [],
    }


def test_every_layer_adds_the_same():
    found = extrapolate(program(2), program(4), 7)
    assert found["activation_peak_bytes"] == 100 + 7 * 7
    assert found["flops"] == 3 + 11 * 7
    assert found["work"]["matmul_flops"] == {
        "float16": 35,
        "float32": 20,
    }  # what only the deeper program has grows with it
    assert [(item["kind"], item["bytes"], item["count"]) for item in found["collectives"]] == [
        ("Send", 512, 16),
        ("AllGather", 146, 8),
    ]
    assert (found["rank"], found["stage"]) == (2, 1)


def test_it_says_so_and_keeps_what_the_compiles_took():
    found = extrapolate(program(2), program(4), 7)
    assert found["extrapolated"] == {"from_layers": [2, 4], "to_layers": 7}
    assert found["compile_seconds"] == 63.0 and found["peak_rss_bytes"] == 4000
    assert found["largest_tensors"] == [{"bytes": 4}] and found["peak_at"] == "line 4"


def test_layers_of_stages():
    assert layers_of_stages(config()) == [7, 7, 7, 7]
    assert layers_of_stages(config(offset=[1, 1, 0, -2])) == [8, 8, 7, 5]
    assert layers_of_stages({**config(), "use_parallel": False}) == [28]
    virtual = config(pp_interleave_num=2, offset=[[1, 1, 0, 0], [0, 0, 1, 1]])
    assert layers_of_stages({**virtual, **INTERLEAVED}) == [7, 7, 7, 7]
    assert layers_of_stages(config(pp_interleave_num=2)) == [7, 7, 7, 7]  # without effect
    named = {"recompute": False, "select_recompute": ["mlp.mul", "input_layernorm.norm"]}  # in every layer
    assert layers_of_stages({**config(), "recompute_config": named}) == [7, 7, 7, 7]


@pytest.mark.parametrize(
    "wrong, told",
    [
        (config(num_layers=30), "num_layers 30"),
        (config(offset=[1, 0]), "model_config.offset"),
        ({**config(pp_interleave_num=7), **INTERLEAVED}, "pp_interleave_num 7 does not divide the 2 layers"),
        ({**config(), "recompute_config": {"recompute": [7, 7, 7, 5]}}, "recompute_config.recompute"),
        ({**config(), "recompute_config": {"recompute": True, "select_recompute": {"mul": True}}}, "select_recompute"),
    ],
)
def test_settings_that_differ_between_layers_are_refused(wrong, told):
    with pytest.raises(InputError, match=told):
        layers_of_stages(wrong)

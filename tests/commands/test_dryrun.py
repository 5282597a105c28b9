"""The command end to end: the report, the strategy files, nothing else left behind, bad input refused."""

import pytest
from dryrun.tiny import CONFIG, run_dryrun
from mindspore.train import node_strategy_pb2

KEYS = {
    "rank",
    "stage",
    "compile_seconds",
    "peak_rss_bytes",
    "parameter_bytes",
    "constant_bytes",
    "activation_peak_bytes",
    "flops",
    "collectives",
    "largest_tensors",
}


def test_one_program_per_stage(report):
    assert report["world_size"] == 4
    assert [(program["rank"], program["stage"]) for program in report["programs"]] == [(0, 0), (2, 1)]
    for program in report["programs"]:
        assert set(program) >= KEYS
        assert program["doubts"] == []
        assert program["compile_seconds"] > 0
        assert program["peak_rss_bytes"] > 100e6


def test_the_phases_of_a_step_make_up_the_peak_of_each_order(report):
    for program in report["programs"]:
        fixed = program["total_bytes"] - program["activation_peak_bytes"]
        assert set(program["at_peak_by_order"]) == {"bfs", "dfs"}
        for order, found in program["at_peak_by_order"].items():
            assert fixed + max(found["passes"], found["update"]) == program["total_bytes_by_order"][order]
            assert sum(found[name] for name in ("gathered", "fresh", "logits")) <= found["passes"]
    last = report["programs"][-1]["at_peak_by_order"]["bfs"]
    assert last["logits"] > 0 and last["gathered"] > 0  # weights are sharded over data parallel 2


def test_names_the_placeholders_of_missing_files(report):
    assert "dataset_dir" in report["programs"][0]["stand_ins"][0]
    assert "vocab_file" in report["programs"][0]["stand_ins"][0]


def test_nothing_else_is_left(pipeline):
    assert sorted(path.name for path in pipeline.iterdir()) == [
        "log",
        "programs",
        "report.json",
        "report.md",
        "report.png",
        "strategy",
    ]


def test_strategy_files_hold_the_layout_of_every_parameter_of_the_stage(pipeline):
    for rank, layer, others in ((0, 0, {"embedding.embedding_weight"}), (2, 1, {"output_layer.weight"})):
        strategy = node_strategy_pb2.ParallelStrategyMap()
        strategy.ParseFromString((pipeline / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt").read_bytes())
        names = {item.param_name for item in strategy.parallel_layout_item}
        assert {f"transformer.{name}" for name in others} <= names
        weight = f"transformer.encoder.layers.{layer}.self_attention.query_key_value.weight"
        assert {weight, f"adam_m.{weight}", f"accu_grads.{weight}"} <= names
        assert not any(f"layers.{1 - layer}." in name for name in names)
        sharded = {
            item.param_name: item.parallel_layouts.opt_weight_shard_step for item in strategy.parallel_layout_item
        }
        assert sharded[weight] == 1  # over data parallel 2


@pytest.mark.parametrize("rank", ["4", "-1", "first"])
def test_a_rank_that_is_not_there_is_refused(tmp_path, rank):
    result = run_dryrun(tmp_path / "out", f"--rank={rank}", parallel_config__pipeline_stage=2)
    assert result.returncode == 2
    assert f"--rank {rank}" in result.stderr and "0 to 3" in result.stderr
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_trainers_refusal_is_shown_as_it_is(tmp_path):
    result = run_dryrun(
        tmp_path / "out", "--rank", "0", train_dataset__max_source_length=400, model__model_config__num_layers=4
    )
    assert result.returncode == 2
    assert "seq_length=64" in result.stderr and "Traceback" not in result.stderr


def test_a_missing_configuration_is_named(tmp_path):
    result = run_dryrun(tmp_path / "out", config=CONFIG.with_name("nothing.yaml"))
    assert result.returncode == 2
    assert "nothing.yaml" in result.stderr

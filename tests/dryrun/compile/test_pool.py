"""Strategy files of all ranks: those of a real compile, and files that upstream's transform_ckpt can use."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from mindspore import Parameter, Tensor, load_checkpoint, save_checkpoint
from mindspore.train import node_strategy_pb2

from dryrun.tiny import FFN, GROUPS, HEADS, HIDDEN, PIPELINE, SIZE, VOCABULARY, run_command, run_dryrun
from mindformers_glm32k.dryrun.compile import pool

QKV = (HEADS + 2 * GROUPS) * SIZE
SHAPES = {
    "self_attention.query_key_value.weight": (QKV, HIDDEN),
    "self_attention.query_key_value.bias": (QKV,),
    "self_attention.dense.weight": (HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h.weight": (2 * FFN, HIDDEN),
    "mlp.dense_4h_to_h.weight": (HIDDEN, FFN),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}
WHOLE = {f"transformer.encoder.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in SHAPES.items()}
WHOLE.update(
    {
        "transformer.embedding.embedding_weight": (VOCABULARY, HIDDEN),
        "transformer.output_layer.weight": (VOCABULARY, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
    }
)
LAST_STAGE = (".layers.1.", "output_layer", "final_layernorm")


@pytest.fixture(scope="module")
def strategies(tmp_path_factory):
    """Folder of the four files of dp 2 x pp 2."""
    folder = tmp_path_factory.mktemp("strategies") / "strategy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_MODE", "predict")  # left behind by a prediction: no business of the compiling processes
        result = run_command("strategy", "--output", str(folder), "--devices", "4", **PIPELINE)
    assert result.returncode == 0, result.stderr
    assert "4 strategy files" in result.stdout
    return folder


def test_all_ranks_and_nothing_else(strategies):
    expected = [f"ckpt_strategy_rank_{rank}.ckpt" for rank in range(4)]
    assert sorted(path.name for path in strategies.iterdir()) == expected


def test_equal_to_what_compiling_the_rank_gives(strategies, pipeline, tmp_path):
    result = run_dryrun(tmp_path, "--rank", "3", **PIPELINE)
    assert result.returncode == 0, result.stderr
    for folder, ranks in ((pipeline, (0, 2)), (tmp_path, (3,))):  # rank 3's file was not compiled, but copied
        for rank in ranks:
            name = f"ckpt_strategy_rank_{rank}.ckpt"
            assert (strategies / name).read_bytes() == (folder / "strategy" / name).read_bytes()


def test_transform_ckpt_cuts_a_whole_checkpoint_and_puts_it_together_again(strategies, tmp_path):
    rng = np.random.default_rng(0)
    whole = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in WHOLE.items()}
    (tmp_path / "whole" / "rank_0").mkdir(parents=True)
    save_checkpoint(
        [{"name": name, "data": Parameter(Tensor(value), name=name)} for name, value in whole.items()],
        str(tmp_path / "whole" / "rank_0" / "whole.ckpt"),
    )
    transform(
        "--dst_ckpt_strategy", strategies, "--src_ckpt_dir", tmp_path / "whole", "--dst_ckpt_dir", tmp_path / "cut"
    )
    for rank in range(4):
        found = load_checkpoint(str(next((tmp_path / "cut" / f"rank_{rank}").glob("*.ckpt"))))
        stage, part = divmod(rank, 2)
        assert set(found) == {name for name in whole if any(mark in name for mark in LAST_STAGE) == bool(stage)}
        cut = layouts(strategies, rank)
        for name, value in found.items():
            # by the optimizer, or by the layout
            is_cut = cut[name].opt_weight_shard_step or cut[name].tensor_map[0].dim[0] >= 0
            expected = np.split(whole[name], 2)[part] if is_cut else whole[name]
            np.testing.assert_array_equal(value.asnumpy(), expected, name)
        weight = f"transformer.encoder.layers.{stage}.mlp.dense_h_to_4h.weight"
        assert found[weight].shape == (FFN, HIDDEN)  # half of it: sharded with the optimizer

    transform(
        "--src_ckpt_strategy", strategies, "--src_ckpt_dir", tmp_path / "cut", "--dst_ckpt_dir", tmp_path / "again"
    )
    again = load_checkpoint(str(next((tmp_path / "again").rglob("*.ckpt"))))
    assert set(again) == set(whole)
    for name, value in again.items():
        np.testing.assert_array_equal(value.asnumpy(), whole[name], name)


def transform(*arguments):
    """Runs upstream's tool."""
    result = subprocess.run(
        [sys.executable, "-m", "mindformers.tools.transform_ckpt", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]


def layouts(folder, rank):
    """Parameter name -> layout, of a rank's file."""
    strategy = node_strategy_pb2.ParallelStrategyMap()
    strategy.ParseFromString((folder / f"ckpt_strategy_rank_{rank}.ckpt").read_bytes())
    return {item.param_name: item.parallel_layouts for item in strategy.parallel_layout_item}


def test_files_of_a_larger_layout_are_not_mixed_in(tmp_path):
    (tmp_path / "ckpt_strategy_rank_5.ckpt").write_bytes(b"another layout's")
    result = run_command("strategy", "--output", str(tmp_path), **PIPELINE)
    assert result.returncode == 2 and "ckpt_strategy_rank_5.ckpt" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_strategy_rank_5.ckpt"]


def test_one_npu_has_no_strategy(tmp_path):
    result = run_command("strategy", "--output", str(tmp_path / "out"), use_parallel=False)
    assert result.returncode == 2 and "use_parallel" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_worker_that_takes_the_last_memory_is_ended_and_named(tmp_path, monkeypatch):
    began = tmp_path / "began"
    program = f"import pathlib, time; held = bytearray(60 << 20); pathlib.Path({str(began)!r}).touch(); time.sleep(300)"
    monkeypatch.setattr(pool, "free_memory", lambda: 1000 if began.exists() else 4 << 30)
    with pytest.raises(pool.WorkerFailed, match=r"rank 3 was not compiled: it held 0\.1 GiB when less than 1\.0 GiB"):
        pool._follow("the program of rank 3 was not compiled", [sys.executable, "-c", program], None, tmp_path / "log")
    assert not any(isinstance(thread, pool._MemoryGuard) for thread in threading.enumerate())


def test_a_worker_is_left_alone_while_there_is_memory(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pool, "free_memory", lambda: asked.append(1) or 2 << 30)
    pool._follow("not compiled", [sys.executable, "-c", "import time; time.sleep(1)"], None, tmp_path / "log.txt")
    assert len(asked) > 1

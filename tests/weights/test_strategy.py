"""The cut of parameters over ranks, against MindSpore's transform_checkpoints."""

import numpy as np
import pytest
from mindspore import (
    Parameter,
    Tensor,
    load_checkpoint,
    merge_pipeline_strategys,
    save_checkpoint,
    transform_checkpoints,
)

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.strategy import ShardSpec, read_file, read_stages, read_strategy
from weights.strategy_files import write_strategy

# name -> dev_matrix, tensor_map, optimizer step and size
LAYOUTS = {
    "whole": ([2, 2, 2], [-1, -1], 0, 0),
    "rows": ([2, 2, 2], [2, -1], 0, 0),
    "columns": ([2, 2, 2], [-1, 0], 0, 0),
    "both": ([2, 2, 2], [0, 1], 0, 0),
    "adam_m.both": ([2, 2, 2], [2, 0], 0, 0),
    "bias": ([2, 2, 2], [1], 0, 0),
    "cube": ([2, 2, 2], [0, -1, 2], 0, 0),
    "one_matrix_axis": ([8], [0, -1], 0, 0),
    "optimizer": ([8], [-1, -1], 1, -1),
    "optimizer_of_two": ([8], [-1, -1], 1, 2),
    "optimizer_of_columns": ([4, 2], [-1, 0], 2, -1),
    "accu_grads.optimizer_of_rows": ([4, 2], [0, -1], 2, 4),
    "optimizer_inside": ([2, 4], [1, -1], 1, -1),
    "adam_v.optimizer_around": ([2, 2, 2], [1, -1], 1, -1),
    "optimizer_part_of_around": ([2, 2, 2], [1, -1], 1, 2),
    "two_axes": ([2, 2, 2], [[2, 1], -1], 0, 0),
    "two_axes_swapped": ([2, 2, 2], [[0, 2], 1], 0, 0),
    "two_axes_and_optimizer": ([2, 2, 2], [[1, 0], -1], 1, 2),
    "three_axes": ([2, 2, 2], [[-1], [2, 1, 0]], 0, 0),
}
SHAPES = {"bias": (16,), "cube": (8, 3, 8)}


def shape_of(name):
    return SHAPES.get(name, (16, 24))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Strategy file, whole parameters, and the parts of 8 ranks as MindSpore cuts them."""
    folder = tmp_path_factory.mktemp("cut")
    write_strategy(folder / "strategy.ckpt", LAYOUTS)
    whole = {name: np.arange(np.prod(shape_of(name)), dtype=np.float32).reshape(shape_of(name)) for name in LAYOUTS}
    (folder / "whole" / "rank_0").mkdir(parents=True)
    save_checkpoint(
        [{"name": name, "data": Parameter(Tensor(value), name=name)} for name, value in whole.items()],
        str(folder / "whole" / "rank_0" / "whole.ckpt"),
    )
    merged = folder / "merged.ckpt"  # parameters marked with their stage, as transform_ckpt wants them
    (folder / "strategies").mkdir()
    (folder / "strategies" / "ckpt_strategy_rank_0.ckpt").write_bytes((folder / "strategy.ckpt").read_bytes())
    merge_pipeline_strategys(str(folder / "strategies"), str(merged))
    transform_checkpoints(str(folder / "whole"), str(folder / "parts"), "checkpoint_", dst_strategy_file=str(merged))
    parts = [
        {
            name: value.asnumpy()
            for name, value in load_checkpoint(
                str(folder / "parts" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
            ).items()
        }
        for rank in range(8)
    ]
    return folder, whole, parts


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_are_those_of_mindspore(cut, name):
    folder, whole, parts = cut
    layout = read_strategy(folder / "strategy.ckpt")[name]
    for rank, expected in enumerate(parts):
        np.testing.assert_array_equal(layout.shard_of(whole[name], rank), expected[name], str(rank))
        assert layout.full_shape(expected[name].shape) == whole[name].shape
    copies = {}
    for rank in range(8):
        copies.setdefault(layout.index(rank), []).append(parts[rank][name].tobytes())
    assert len(copies) == np.prod(layout.counts)
    assert all(len(set(same)) == 1 for same in copies.values())


def test_merged_file_says_the_same(cut):
    folder, _, _ = cut
    assert read_file(folder / "merged.ckpt") == read_file(folder / "strategy.ckpt")
    assert read_stages(folder / "merged.ckpt") == [read_strategy(folder / "strategy.ckpt")]


def test_ranks_count_from_the_first_of_their_stage_and_repeat_beyond_it():
    layout = ShardSpec((2,), ((0,), ()))
    assert layout.slices(1, (4, 3)) == (slice(2, 4), slice(0, 3)) == layout.slices(3, (4, 3))


def test_a_scalar_is_whole():
    assert ShardSpec((2, 2), ()).slices(3, ()) == ()


@pytest.mark.parametrize(
    "shape, words", [((4,), "1 axes, the layout is for 2"), ((5, 4), "divided evenly into (2, 1)")]
)
def test_shapes_that_do_not_fit(shape, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(").replace(")", r"\)")):
        ShardSpec((2,), ((0,), ())).slices(0, shape)


def test_stages_come_from_any_number_of_files(tmp_path):
    for rank, stage in enumerate((0, 0, 1, 1)):
        write_strategy(tmp_path / f"ckpt_strategy_rank_{rank}.ckpt", {f"weight_{stage}": ([2], [0, -1], 0, 0)}, stage)
    (tmp_path / "merged_ckpt_strategy.ckpt").write_bytes(b"left behind by transform_ckpt")
    assert [list(stage) for stage in read_stages(tmp_path)] == [["weight_0"], ["weight_1"]]


def test_damage_is_named(tmp_path):
    layouts = {"weight": ([2], [0, -1], 0, 0)}
    with pytest.raises(InputError, match="no strategy files"):
        read_stages(tmp_path)
    write_strategy(tmp_path / "a" / "ckpt_strategy_rank_2.ckpt", layouts, 1)
    with pytest.raises(InputError, match="stage 0 is missing"):
        read_stages(tmp_path / "a")
    write_strategy(tmp_path / "b" / "ckpt_strategy_rank_0.ckpt", layouts)
    write_strategy(tmp_path / "b" / "ckpt_strategy_rank_1.ckpt", {"weight": ([2], [-1, 0], 0, 0)})
    with pytest.raises(InputError, match="rank_1.ckpt: gives stage 0 other layouts"):
        read_stages(tmp_path / "b")
    content = (tmp_path / "b" / "ckpt_strategy_rank_0.ckpt").read_bytes()
    for name, damaged in (("cut", content[:-3]), ("text", b"layer: 1\n"), ("empty", b"")):
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name}.ckpt: "):
            read_strategy(path)

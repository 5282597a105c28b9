"""Collectives of real meetings, one thread a rank, against the examples in MindSpore's docstrings or their formulas."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dryrun.simulator.operators.calling import call, covers, random, spec
from mindformers_glm32k.dryrun.simulator.network import Network, NetworkError


def together(name, tensors, to="float32", ranks=None, **attributes):
    """Results of all ranks, each calling with its own tensor."""
    ranks = tuple(ranks or range(len(tensors)))
    network = Network(len(tensors))
    attributes = {"group": "some group", "group_rank_ids": ranks, **attributes}

    def one(rank, tensor):
        try:
            return call(name, tensor, to=to, rank=rank, network=network, **attributes)
        except Exception as error:
            network.end(rank, error)
            raise

    with ThreadPoolExecutor(len(tensors)) as pool:
        waiting = [pool.submit(one, rank, tensor) for rank, tensor in zip(sorted(ranks), tensors)]
    return [item.result() for item in waiting]


@covers("AllReduce")
@pytest.mark.parametrize(
    "op, function", [("sum", np.add), ("max", np.maximum), ("min", np.minimum), ("prod", np.multiply)]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32"])
def test_all_reduce(op, function, dtype):
    tensors = [
        (random((2, 3), seed=rank) * 4).astype(np.int32) if dtype == "int32" else random((2, 3), dtype, rank)
        for rank in range(3)
    ]
    exact = function.reduce([tensor.astype(np.float64) for tensor in tensors])
    for result in together("AllReduce", tensors, dtype, op=op):
        np.testing.assert_allclose(
            result, exact, rtol={"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3, "int32": 0}[dtype]
        )


@covers("AllReduce")
def test_all_reduce_rounds_once_and_keeps_overflow():
    half = [np.array([value], np.float16) for value in (2048, 1, 1, 1, 1)]
    assert together("AllReduce", half, "float16", op="sum")[0] == 2052
    assert np.isinf(together("AllReduce", [np.array([60000], np.float16)] * 2, "float16", op="sum")[1])


@covers("AllReduce")
def test_an_unknown_reduction_is_refused():
    with pytest.raises(NotImplementedError, match="op 'avg'"):
        together("AllReduce", [random((2,))], op="avg")
    with pytest.raises(KeyError, match="no attribute 'op'"):
        together("AllReduce", [random((2,))])


@covers("AllGather")
def test_all_gather():
    tensors = [np.ones((2, 8), np.float32) * rank for rank in range(2)]
    for result in together("AllGather", tensors):
        np.testing.assert_array_equal(result, [[0] * 8] * 2 + [[1] * 8] * 2)


@covers("AllGather", "ReduceScatter")
def test_members_stand_in_the_order_of_the_group():
    tensors = [np.array([rank], np.float32) for rank in range(3)]
    for result in together("AllGather", tensors, ranks=(2, 0, 1)):
        assert result.tolist() == [2, 0, 1]
    tensors = [np.arange(3, dtype=np.float32)] * 3
    parts = together("ReduceScatter", tensors, ranks=(2, 0, 1), op="sum")
    assert [part.tolist() for part in parts] == [[3], [6], [0]]


@covers("ReduceScatter")
def test_reduce_scatter():
    tensors = [np.ones((8, 8), np.float32)] * 2
    for result in together("ReduceScatter", tensors, op="sum"):
        np.testing.assert_array_equal(result, np.full((4, 8), 2))


@covers("ReduceScatter", "AllGather", "AllReduce")
def test_a_scatter_gathered_is_the_reduction():
    tensors = [random((6, 5), "float16", rank) for rank in range(3)]
    parts = together("ReduceScatter", tensors, "float16", op="sum")
    gathered = together("AllGather", parts, "float16")
    np.testing.assert_array_equal(gathered[0], together("AllReduce", tensors, "float16", op="sum")[2])


@covers("AlltoAll")
def test_all_to_all():
    """mindspore.ops.AlltoAll: 8 devices, input (1, 1, 8, 1) holding 0 to 7, split along -2, joined along -1."""
    tensors = [np.arange(8, dtype=np.float32).reshape(1, 1, 8, 1)] * 8
    for rank, result in enumerate(together("AlltoAll", tensors, split_count=8, split_dim=-2, concat_dim=-1)):
        assert result.tolist() == [[[[rank] * 8]]]


@covers("AlltoAll")
def test_all_to_all_moves_tokens_for_heads_and_back():
    whole = random((8, 4, 3))  # tokens, heads, head size
    by_token = [whole[2 * rank : 2 * rank + 2] for rank in range(4)]
    by_head = together("AlltoAll", by_token, split_count=4, split_dim=1, concat_dim=0)
    for rank, result in enumerate(by_head):
        np.testing.assert_array_equal(result, whole[:, rank : rank + 1])
    for before, after in zip(by_token, together("AlltoAll", by_head, split_count=4, split_dim=0, concat_dim=1)):
        np.testing.assert_array_equal(before, after)
    with pytest.raises(ValueError, match="3 chunks in a group of 4"):
        together("AlltoAll", by_token, split_count=3, split_dim=1, concat_dim=0)


@covers("Broadcast")
def test_broadcast():
    tensors = [(np.array([rank], np.float32), np.array([10 + rank], np.float32)) for rank in range(3)]
    for result in together("Broadcast", tensors, to=("float32", "float32"), ranks=(2, 0, 1), root_rank=1):
        assert [item.tolist() for item in result] == [[1], [11]]


@covers("AllReduce", "ReduceScatter")
def test_what_does_not_match_is_found():
    for name, tensors in (
        ("AllReduce", [random((2,)), random((3,))]),
        ("ReduceScatter", [random((2,)), random((2,), "float16")]),
    ):
        with pytest.raises(NetworkError, match="differ in their collective number 1"):
            together(name, tensors, op="sum")


@covers("Send", "Receive")
def test_messages_are_told_apart_by_tag():
    network = Network(2)
    first, second = random((2, 3)), random((2, 3), seed=1)
    common = {"group": "pair", "group_rank_ids": (0, 1)}
    for tag, tensor in ((0, first), (1, second)):
        assert call("Send", tensor, rank=0, network=network, dst_global_rank=1, sr_tag=tag, **common) is tensor
    for tag, tensor in ((1, second), (0, first)):
        received = call(
            "Receive",
            np.zeros(1, np.float32),
            to=spec("float32", (2, 3)),
            rank=1,
            network=network,
            src_global_rank=0,
            sr_tag=tag,
            **common,
        )
        np.testing.assert_array_equal(received, tensor)
    assert network.unread() == []

"""Collectives, sends and receives, over the simulated network.

The attributes `group` (its name) and `group_rank_ids` (its ranks) say who takes part. Sums of fp16 and bfloat16 are
float32 sums in the order of the ranks, rounded once; HCCL's order depends on its algorithm.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import Array, Call, as_output, operator, wide

_REDUCTIONS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


def _ranks(call):
    """Global ranks of the group."""
    ranks = call.attribute("group_rank_ids")
    return ranks if isinstance(ranks, tuple) else (ranks,)


def _exchange(call, x, *details):
    """All members' tensors, and this rank's index among them."""
    ranks = _ranks(call)
    output = call.output if not isinstance(call.output, tuple) else call.output[0]
    arrays = call.network.collective(call.rank, call.op, call.attribute("group"), ranks, x, (output.dtype, *details))
    return arrays, ranks.index(call.rank)


def _reduced(call, arrays):
    name = call.attribute("op")
    if name not in _REDUCTIONS:
        raise NotImplementedError(f"{call.op} with op {name!r}: only {sorted(_REDUCTIONS)} are implemented")
    total = wide(arrays[0])
    for array in arrays[1:]:
        total = _REDUCTIONS[name](total, wide(array))
    return total


@operator("AllReduce")
def all_reduce(call: Call, x: Array) -> Array:
    """Sum (max, min, prod: the attribute `op`) of the members' tensors, on each."""
    arrays, _ = _exchange(call, x, call.attribute("op"))
    return as_output(_reduced(call, arrays), call.output)


@operator("AllGather")
def all_gather(call: Call, x: Array) -> Array:
    """The members' tensors along axis 0, on each."""
    arrays, _ = _exchange(call, x)
    return np.concatenate(arrays)


@operator("ReduceScatter")
def reduce_scatter(call: Call, x: Array) -> Array:
    """The reduced tensor (attribute `op`), scattered along axis 0: member i gets chunk i."""
    arrays, index = _exchange(call, x, call.attribute("op"))
    chunks = [np.split(array, len(arrays))[index] for array in arrays]
    return as_output(_reduced(call, chunks), call.output)


@operator("AlltoAll")
def all_to_all(call: Call, x: Array) -> Array:
    """Each member splits its tensor along `split_dim`; member i concatenates all chunks i along `concat_dim`."""
    split, concat, count = (int(call.attribute(name)) for name in ("split_dim", "concat_dim", "split_count"))
    arrays, index = _exchange(call, x, split, concat)
    if count != len(arrays):
        raise ValueError(f"AlltoAll splits into {count} chunks in a group of {len(arrays)}")
    return np.concatenate([np.split(array, count, split)[index] for array in arrays], concat)


@operator("Broadcast")
def broadcast(call: Call, tensors: tuple[Array, ...]) -> tuple[Array, ...]:
    """The tensors (a tuple) of the member whose global rank is `root_rank`, on each."""
    root = _ranks(call).index(int(call.attribute("root_rank")))
    return tuple(_exchange(call, tensor, root)[0][root] for tensor in tensors)


@operator("Send")
def send(call: Call, x: Array) -> Array:
    """Sends x to rank `dst_global_rank`; group and `sr_tag` tell messages apart. -> x, which orders what follows."""
    tag = (call.attribute("group"), int(call.attribute("sr_tag")))
    call.network.send(call.rank, int(call.attribute("dst_global_rank")), tag, x)
    return x


@operator("Receive")
def receive(call: Call, order: Any = None) -> Array:
    """What rank `src_global_rank` sent with the same group and `sr_tag`; the input only orders the calls."""
    tag = (call.attribute("group"), int(call.attribute("sr_tag")))
    return call.network.receive(call.rank, int(call.attribute("src_global_rank")), tag, call.output)

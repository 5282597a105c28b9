"""Collectives, sends and receives, by the network of ranks.

The attributes `group` (its name) and `group_rank_ids` (its ranks) say who meets. Sums of fp16 and bfloat16 are float32
sums in the order of the ranks, rounded once; HCCL's order depends on its algorithm.
"""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import operator
from mindformers_glm32k.dryrun.simulator.operators.numeric import as_output, attribute, wide

_REDUCTIONS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


def _ranks(call):
    """tuple[int]: global ranks of the group."""
    ranks = attribute(call, "group_rank_ids")
    return ranks if isinstance(ranks, tuple) else (ranks,)


def _meet(call, x, *details):
    """All members' tensors, and this rank's place among them."""
    ranks = _ranks(call)
    output = call.output if not isinstance(call.output, tuple) else call.output[0]
    arrays = call.network.meet(call.rank, call.op, attribute(call, "group"), ranks, x, (output.dtype, *details))
    return arrays, ranks.index(call.rank)


def _reduced(call, arrays):
    name = attribute(call, "op")
    if name not in _REDUCTIONS:
        raise NotImplementedError(f"{call.op} with op {name!r}: only {sorted(_REDUCTIONS)} are implemented")
    total = wide(arrays[0])
    for array in arrays[1:]:
        total = _REDUCTIONS[name](total, wide(array))
    return total


@operator("AllReduce")
def all_reduce(call, x):
    """Sum (max, min, prod: the attribute `op`) of the members' tensors, on each."""
    arrays, _ = _meet(call, x, attribute(call, "op"))
    return as_output(_reduced(call, arrays), call.output)


@operator("AllGather")
def all_gather(call, x):
    """The members' tensors along axis 0, on each."""
    arrays, _ = _meet(call, x)
    return np.concatenate(arrays)


@operator("ReduceScatter")
def reduce_scatter(call, x):
    """The reduced tensor (attribute `op`), cut along axis 0: member i gets part i."""
    arrays, place = _meet(call, x, attribute(call, "op"))
    parts = [np.split(array, len(arrays))[place] for array in arrays]
    return as_output(_reduced(call, parts), call.output)


@operator("AlltoAll")
def all_to_all(call, x):
    """Each member cuts its tensor along `split_dim`; member i joins everybody's part i along `concat_dim`."""
    split, concat, count = (int(attribute(call, name)) for name in ("split_dim", "concat_dim", "split_count"))
    arrays, place = _meet(call, x, split, concat)
    if count != len(arrays):
        raise ValueError(f"AlltoAll cuts into {count} parts in a group of {len(arrays)}")
    return np.concatenate([np.split(array, count, split)[place] for array in arrays], concat)


@operator("Broadcast")
def broadcast(call, tensors):
    """The tensors (a tuple) of the member whose global rank is `root_rank`, on each."""
    root = _ranks(call).index(int(attribute(call, "root_rank")))
    return tuple(_meet(call, tensor, root)[0][root] for tensor in tensors)


@operator("Send")
def send(call, x):
    """Sends x to rank `dst_global_rank`; group and `sr_tag` tell messages apart. -> x, which orders what follows."""
    tag = (attribute(call, "group"), int(attribute(call, "sr_tag")))
    call.network.send(call.rank, int(attribute(call, "dst_global_rank")), tag, x)
    return x


@operator("Receive")
def receive(call, order=None):
    """What rank `src_global_rank` sent with the same group and `sr_tag`; the input only orders the calls."""
    tag = (attribute(call, "group"), int(attribute(call, "sr_tag")))
    return call.network.receive(call.rank, int(attribute(call, "src_global_rank")), tag, call.output)

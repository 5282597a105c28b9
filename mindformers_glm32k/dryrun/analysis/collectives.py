"""Communication of a traced program: every collective with its group, element type and bytes."""

from collections import defaultdict
from dataclasses import dataclass

KINDS = (
    "AllReduce",
    "AllGather",
    "ReduceScatter",
    "AlltoAll",
    "AllToAll",
    "AlltoAllV",
    "AlltoAllVC",
    "Send",
    "Receive",
    "Broadcast",
    "NeighborExchange",
    "NeighborExchangeV2",
    "Reduce",
    "CollectiveScatter",
    "CollectiveGather",
    "AllGatherV",
    "ReduceScatterV",
)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind over one group in one element type.

    Args:
        kind (str): "AllReduce", …; Send and Receive are point to point.
        group_ranks (tuple[int]): who takes part; for Send and Receive this rank and the other one.
        dtype (str): element type.
        purpose (str): the primitive's instance name, e.g. "parallel_optimizer_allgather".
        part (str): "forward", "backward" or "recompute".
        bytes (int): over all calls of a step, of the larger of what a call reads and writes.
        count (int): calls in a step.
    """

    kind: str
    group_ranks: tuple
    dtype: str
    purpose: str
    part: str
    bytes: int
    count: int


def list_collectives(trace, rank):
    """All communication of a step.

    Args:
        trace (Trace): from `trace_program`.
        rank (int): the device that the program is for.

    Returns:
        list[Collective]: largest first.
    """
    sums = defaultdict(lambda: [0, 0])
    for event in trace.events:
        node = event.node
        if node.op not in KINDS:
            continue
        tensors = event.writes + event.reads
        reads, writes = (sum(buffer.spec.bytes for buffer in side) for side in (event.reads, event.writes))
        moved = reads if node.op == "Send" else writes if node.op == "Receive" else max(reads, writes)
        entry = sums[
            node.op,
            group_ranks(node, rank),
            tensors[0].spec.dtype if tensors else "none",
            node.instance or node.op,
            event.part,
        ]
        entry[0] += moved
        entry[1] += 1
    found = [Collective(*key, total, calls) for key, (total, calls) in sums.items()]
    return sorted(found, key=lambda collective: -collective.bytes)


def group_ranks(node, rank):
    """tuple[int]: the ranks that a communication node connects."""
    other = node.attributes.get("dst_global_rank", node.attributes.get("src_global_rank"))
    if node.op in ("Send", "Receive") and other is not None:
        return tuple(sorted((rank, other)))
    ranks = node.attributes.get("group_rank_ids", node.attributes.get("group_ranks", ()))
    if isinstance(ranks, str):
        ranks = [int(part) for part in ranks.split("-") if part]
    return tuple(ranks) if isinstance(ranks, (tuple, list)) else (ranks,)

"""What a step asks of a device: memory, floating point operations, bytes that memory-bound operators move,
communication."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mindformers_glm32k.dryrun.analysis.mindir import Node
from mindformers_glm32k.dryrun.analysis.trace import Buffer, Event, Literal, Trace
from mindformers_glm32k.weights.names import SCRATCH_PREFIX, STATE_PREFIXES

MATRIX_PRODUCTS = ("MatMul", "BatchMatMul", "MatMulExt", "BatchMatMulExt", "Dense")
# FLOPs per (query, key) pair and feature; the gradient recomputes the scores and has 5 products, the forward 2.
ATTENTION = {"FlashAttentionScore": 4, "FlashAttentionScoreGrad": 10, "PagedAttention": 4}
_REDUCING = frozenset(("AllReduce", "Reduce", "ReduceScatter", "ReduceScatterV"))
_COPYING = frozenset(("AllGather", "AllGatherV", "Broadcast", "CollectiveGather", "CollectiveScatter"))
_EXCHANGING = frozenset(("AlltoAll", "AllToAll", "AlltoAllV", "AlltoAllVC", "NeighborExchange", "NeighborExchangeV2"))
COLLECTIVES = _REDUCING | _COPYING | _EXCHANGING | {"Send", "Receive"}
# Operators that read only the elements of their first operand that they write.
_SELECTING = frozenset(("StridedSlice", "Slice", "Gather", "GatherD", "GatherNd", "EmbeddingLookup"))
# Attention's sparse modes in which a kernel skips the tiles above the diagonal (CANN, aclnnFlashAttentionScore).
_CAUSAL_MODES = (2, 3)
_TND = 4  # MindSpore's enum value of that input_layout


def count_flops(trace: Trace) -> dict[tuple[str, str], int]:
    """FLOPs of a step by kind ("matmul", "attention") and part ("forward", "backward", "recompute").

    A multiply-add counts as two; elementwise work is left out. Attention is counted over all pairs of positions, as is
    usual; a kernel that skips what a causal mask hides does about half of that.
    """
    counts = defaultdict(int)
    for event in trace.events:
        if event.node.op in MATRIX_PRODUCTS:
            counts["matmul", event.part] += _flops_of_product(event)
        elif event.node.op in ATTENTION:
            counts["attention", event.part] += _flops_of_attention(event)
    return dict(counts)


def measure_work(trace: Trace) -> dict:
    """Work of a step, attention as its kernel does it: with a causal mask that the kernel knows of (sparse modes 2 and
    3, or mode 0 with next_tokens 0), the pairs above the diagonal are left out.

    Returns:
        "matmul_flops" and "attention_flops" by dtype of the operands, "vector_bytes" (read and written by all other
        operators except communication, without fusion, whose savings are not known here) and "vector_operations".
    """
    matmul, attention = defaultdict(int), defaultdict(int)
    moved = operations = 0
    for event in trace.events:
        operator = event.node.op
        if operator in MATRIX_PRODUCTS:
            matmul[event.reads[0].spec.dtype] += _flops_of_product(event)
        elif operator in ATTENTION:
            attention[event.reads[0].spec.dtype] += round(_flops_of_attention(event) * _share_of_pairs(event))
        elif operator not in COLLECTIVES:
            moved += _bytes_moved(event)
            operations += 1
    return {
        "matmul_flops": dict(matmul),
        "attention_flops": dict(attention),
        "vector_bytes": moved,
        "vector_operations": operations,
    }


def _flops_of_product(event: Event) -> int:
    result, left = event.writes[0].spec, event.reads[0].spec
    elements = result.bytes // result.itemsize
    return 2 * elements * left.shape[-2 if _transposes_left(event) else -1]


def _transposes_left(event):
    """The flag is an input of newer primitives and an attribute of older ones."""
    flags = [argument.value for argument in event.arguments[2:] if isinstance(argument, Literal)]
    if flags:
        return bool(flags[0])
    attributes = event.node.attributes
    return bool(attributes.get("transpose_a", attributes.get("transpose_x1", False)))


def _flops_of_attention(event: Event) -> int:
    """Sum over the sequences of a batch of query positions x key positions x query width (heads x head size), times
    the FLOPs of a pair.

    Prompts or documents flattened into one TH or TND operand count as one sequence: their lengths are known only at run
    time. Paged attention is counted over all slots of its block tables.
    """
    query, key = event.reads[0].spec, event.reads[1].spec
    elements = query.bytes // query.itemsize
    if event.node.op == "PagedAttention":  # keys: (blocks, block size, heads, head size); tables: (batch, blocks)
        positions = key.shape[1] * event.reads[3].spec.shape[-1]
    else:
        positions = key.shape[_position_axis(event)]
    return ATTENTION[event.node.op] * elements * positions


def _position_axis(event):
    """Which axis of an attention kernel's operands counts positions: of TH and TND 0, of BSH 1, of BNSD 2.

    The kernel's last argument but one is input_layout (MindSpore 2.7 to 2.9).
    """
    input_layout = event.arguments[-2] if len(event.arguments) > 1 else None
    if isinstance(input_layout, Literal) and input_layout.value == _TND and len(event.reads[0].spec.shape) == 3:
        return 0
    return len(event.reads[0].spec.shape) - 2


def _share_of_pairs(event):
    """The share of all (query, key) pairs that an attention kernel computes.

    The kernel's last arguments are scale, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode (MindSpore
    2.7 to 2.9).
    """
    if event.node.op == "PagedAttention":
        return 1.0
    tail = [argument.value if isinstance(argument, Literal) else None for argument in event.arguments[-4:]]
    next_tokens, mode = (tail[0], tail[3]) if len(tail) == 4 else (None, None)
    queries, keys = (buffer.spec.shape[_position_axis(event)] for buffer in event.reads[:2])
    if queries != keys or not (mode in _CAUSAL_MODES or (mode == 0 and next_tokens == 0)):
        return 1.0
    return (queries + 1) / (2 * queries)


def _bytes_moved(event):
    """Bytes read and written, in-place updates included."""
    written = _size(event.node.output)
    read = sum(buffer.spec.bytes for buffer in event.reads)
    return written + (min(read, written) if event.node.op in _SELECTING else read)


def _size(output):
    if isinstance(output, tuple):
        return sum(_size(item) for item in output)
    return output.bytes if output is not None else 0


def list_collectives(trace: Trace, rank: int) -> list[dict]:
    """All communication of a step of the program of `rank`, largest first.

    Returns:
        One entry per "kind" ("AllReduce", …; Send and Receive are point to point), "group_ranks" (for Send and Receive
        this rank and its peer), "dtype", "purpose" (the primitive's instance name, such as
        "parallel_optimizer_allgather") and "part" ("forward", "backward", "recompute"), with "count" (calls of a step)
        and "bytes" (the larger of what a call reads and writes, summed over the calls).
    """
    sums = defaultdict(lambda: [0, 0])
    for event in trace.events:
        node = event.node
        if node.op not in COLLECTIVES:
            continue
        tensors = event.writes + event.reads
        reads, writes = (sum(buffer.spec.bytes for buffer in side) for side in (event.reads, event.writes))
        moved = reads if node.op == "Send" else writes if node.op == "Receive" else max(reads, writes)
        dtype = tensors[0].spec.dtype if tensors else "none"
        entry = sums[node.op, group_ranks(node, rank), dtype, node.instance or node.op, event.part]
        entry[0] += moved
        entry[1] += 1
    names = ("kind", "group_ranks", "dtype", "purpose", "part", "bytes", "count")
    found = [dict(zip(names, (*key, *totals))) for key, totals in sums.items()]
    return sorted(found, key=lambda item: -item["bytes"])


def group_ranks(node: Node, rank: int) -> tuple[int, ...]:
    """The ranks that a communication node of the program of `rank` connects."""
    other = node.attributes.get("dst_global_rank", node.attributes.get("src_global_rank"))
    if node.op in ("Send", "Receive") and other is not None:
        return tuple(sorted((rank, other)))
    ranks = node.attributes.get("group_rank_ids", node.attributes.get("group_ranks", ()))
    if isinstance(ranks, str):
        ranks = [int(part) for part in ranks.split("-") if part]
    return tuple(ranks) if isinstance(ranks, (tuple, list)) else (ranks,)


@dataclass
class Memory:
    """Bytes on one device.

    Args:
        parameters: by kind: "weights", "accumulators", "optimizer", "cache", "other".
        parameter_count: elements of the weights that this device holds.
        constants: constant tensors of the program.
        inputs: the step's data.
        activation_peak: largest sum of buffers alive at one time.
        peak_event: the event at the peak.
        at_peak: the buffers alive at the peak, largest first.
        curve: live bytes after each event.
    """

    parameters: dict[str, int]
    parameter_count: int
    constants: int
    inputs: int
    activation_peak: int
    peak_event: Event | None
    at_peak: list[Buffer]
    curve: list[int]

    @property
    def total(self) -> int:
        """Bytes that the device needs at the peak."""
        return sum(self.parameters.values()) + self.constants + self.inputs + self.activation_peak


def parameter_kind(name: str) -> str:
    """Which kind a parameter is, by the prefixes that MindSpore and MindFormers give: "accumulators" (gradients summed
    over micro batches), "optimizer" (AdamW's moments), "cache" (keys and values of prediction), "weights", or "other"
    (counters, loss scale, …)."""
    if name.startswith(SCRATCH_PREFIX):
        return "accumulators"
    if name.startswith(STATE_PREFIXES):
        return "optimizer"
    if name.endswith(("key_cache", "value_cache")):
        return "cache"
    return "weights" if "transformer." in name or ".layers." in name else "other"


def measure(trace: Trace) -> Memory:
    """Adds up a trace's memory.

    The peak follows from every buffer's lifetime in program order: from the operation that writes it to the last one
    that reads it or a view of it. Micro batches in flight are buffers like all others. A kernel's workspace is not
    counted.
    """
    parameters = dict.fromkeys(("weights", "accumulators", "optimizer", "cache", "other"), 0)
    count = 0
    for buffer in trace.parameters:
        kind = parameter_kind(buffer.name)
        parameters[kind] += buffer.spec.bytes
        if kind == "weights":
            count += buffer.spec.bytes // buffer.spec.itemsize
    changes = defaultdict(int)
    for buffer in trace.activations:
        changes[buffer.made] += buffer.spec.bytes
        changes[buffer.last + 1] -= buffer.spec.bytes
    curve, live = [], 0
    for index in range(len(trace.events)):
        live += changes[index]
        curve.append(live)
    peak = max(curve, default=0)
    at = curve.index(peak) if curve else -1
    alive = [buffer for buffer in trace.activations if buffer.made <= at <= buffer.last]
    return Memory(
        parameters,
        count,
        sum(buffer.spec.bytes for buffer in trace.constants),
        sum(buffer.spec.bytes for buffer in trace.inputs),
        peak,
        trace.events[at] if curve else None,
        sorted(alive, key=lambda buffer: -buffer.spec.bytes),
        curve,
    )

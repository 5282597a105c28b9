"""What a step asks of a device's units: FLOPs that its kernels really do, and bytes that its other operators move."""

from collections import defaultdict

from mindformers_glm32k.dryrun.analysis import flops
from mindformers_glm32k.dryrun.analysis.collectives import KINDS
from mindformers_glm32k.dryrun.analysis.trace import Literal

# Operators that touch of their first operand only what they write.
_SELECTING = frozenset(("StridedSlice", "Slice", "Gather", "GatherD", "GatherNd", "EmbeddingLookup"))
# Attention's sparse modes in which a kernel skips the tiles above the diagonal (CANN, aclnnFlashAttentionScore).
_CAUSAL_MODES = (2, 3)


def measure(trace):
    """Adds up a trace's work.

    Attention is counted as its kernel does it: with a causal mask that the kernel knows of (sparse modes 2 and 3, or mode 0
    with next_tokens 0), the pairs above the diagonal are left out. `flops.count` counts all pairs, as is usual.

    Args:
        trace (Trace): from `trace_program`.

    Returns:
        dict: "matmul_flops" and "attention_flops" by element type of the operands, "vector_bytes" (read and written by all
        operators that are neither of these nor communication, each by itself: what a fusion saves is not known here) and
        "vector_operations"; of a step.
    """
    matmul, attention = defaultdict(int), defaultdict(int)
    moved = operations = 0
    for event in trace.events:
        operator = event.node.op
        if operator in flops.MATRIX_PRODUCTS:
            matmul[event.reads[0].spec.dtype] += flops.of_product(event)
        elif operator in flops.ATTENTION:
            attention[event.reads[0].spec.dtype] += round(flops.of_attention(event) * share_of_pairs(event))
        elif operator not in KINDS:
            moved += _bytes(event)
            operations += 1
    return {
        "matmul_flops": dict(matmul),
        "attention_flops": dict(attention),
        "vector_bytes": moved,
        "vector_operations": operations,
    }


def share_of_pairs(event):
    """float: the part of all (query, key) pairs that an attention kernel works on.

    The kernel's last arguments are scale, pre_tokens, next_tokens, inner_precise, layout, sparse_mode (MindSpore 2.7 to 2.9).
    """
    if event.node.op == "PagedAttention":
        return 1.0
    tail = [argument.value if isinstance(argument, Literal) else None for argument in event.arguments[-4:]]
    next_tokens, mode = (tail[0], tail[3]) if len(tail) == 4 else (None, None)
    queries, keys = (buffer.spec.shape[flops.position_axis(event)] for buffer in event.reads[:2])
    if queries != keys or not (mode in _CAUSAL_MODES or (mode == 0 and next_tokens == 0)):
        return 1.0
    return (queries + 1) / (2 * queries)


def _bytes(event):
    """Read and written, results that are updates in place included."""
    written = _size(event.node.output)
    read = sum(buffer.spec.bytes for buffer in event.reads)
    return written + (min(read, written) if event.node.op in _SELECTING else read)


def _size(output):
    if isinstance(output, tuple):
        return sum(_size(item) for item in output)
    return output.bytes if output is not None else 0

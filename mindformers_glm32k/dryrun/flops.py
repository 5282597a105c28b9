"""Floating point operations of a traced program, counted from the shapes of its matrix products and attention kernels."""
from collections import defaultdict

from mindformers_glm32k.dryrun.trace import Literal

MATRIX_PRODUCTS = ("MatMul", "BatchMatMul", "MatMulExt", "BatchMatMulExt", "Dense")
# FlashAttentionScoreGrad recomputes the scores and makes four products of the forward's size: 5 where that has 2.
ATTENTION = {"FlashAttentionScore": 4, "FlashAttentionScoreGrad": 10}


def count(trace):
    """Counts a multiply-add as two; elementwise work is left out.

    Attention is counted over all pairs of positions, as is usual; a kernel that skips what a causal mask hides does about
    half of that.

    Args:
        trace (Trace): from `trace_program`.

    Returns:
        dict[tuple[str, str], int]: (what, part) -> FLOPs of a step; what is "matmul" or "attention", part "forward",
        "backward" or "recompute".
    """
    counts = defaultdict(int)
    for event in trace.events:
        if event.node.op in MATRIX_PRODUCTS:
            counts["matmul", event.part] += of_product(event)
        elif event.node.op in ATTENTION:
            counts["attention", event.part] += of_attention(event)
    return dict(counts)


def of_product(event):
    """int: FLOPs of one matrix product."""
    result, left = event.writes[0].spec, event.reads[0].spec
    elements = result.bytes // result.itemsize
    return 2 * elements * left.shape[-2 if _transposes_left(event) else -1]


def of_attention(event):
    """int: FLOPs of one attention kernel over all pairs of positions."""
    return ATTENTION[event.node.op] * _pairs(event)


def _transposes_left(event):
    """The flag is an input of newer primitives and an attribute of older ones."""
    flags = [argument.value for argument in event.arguments[2:] if isinstance(argument, Literal)]
    if flags:
        return bool(flags[0])
    attributes = event.node.attributes
    return bool(attributes.get("transpose_a", attributes.get("transpose_x1", False)))


def _pairs(event):
    """batch x query positions x key positions x query width (heads x head size)."""
    query, key = event.reads[0].spec.shape, event.reads[1].spec.shape
    if len(query) == 3:  # BSH
        return query[0] * query[1] * query[2] * key[1]
    return query[0] * query[1] * query[2] * query[3] * key[2]  # BNSD

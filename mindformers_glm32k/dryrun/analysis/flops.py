"""Floating point operations of a traced program, from the shapes of its matrix products and attention kernels."""

from collections import defaultdict

from mindformers_glm32k.dryrun.analysis.trace import Literal

MATRIX_PRODUCTS = ("MatMul", "BatchMatMul", "MatMulExt", "BatchMatMulExt", "Dense")
# FlashAttentionScoreGrad recomputes the scores and makes four products of the forward's size: 5 where that has 2.
ATTENTION = {"FlashAttentionScore": 4, "FlashAttentionScoreGrad": 10, "PagedAttention": 4}


def count(trace):
    """Counts a multiply-add as two; elementwise work is left out.

    Attention is counted over all pairs of positions, as is usual; a kernel that skips what a causal mask hides does
    about half of that.

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


_TND = 4  # MindSpore's number of the layout


def position_axis(event):
    """int: which axis of an attention kernel's operands counts positions: of TH and TND 0, of BSH 1, of BNSD 2.

    The kernel's last argument but one is its layout (MindSpore 2.7 to 2.9).
    """
    layout = event.arguments[-2] if len(event.arguments) > 1 else None
    if isinstance(layout, Literal) and layout.value == _TND and len(event.reads[0].spec.shape) == 3:
        return 0
    return len(event.reads[0].spec.shape) - 2


def _pairs(event):
    """Sum over the rows of a batch of query positions x key positions x query width (heads x head size).

    Prompts or documents that lie behind each other in one TH or TND operand are taken for one: their lengths are known
    only at run time.
    Paged attention is counted over all slots of its block tables.
    """
    query, key = event.reads[0].spec, event.reads[1].spec
    elements = query.bytes // query.itemsize
    if event.node.op == "PagedAttention":  # keys: (blocks, block size, heads, head size); tables: (batch, blocks)
        return elements * key.shape[1] * event.reads[3].spec.shape[-1]
    return elements * key.shape[position_axis(event)]

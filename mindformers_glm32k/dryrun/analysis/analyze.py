"""From a compiled program to the figures of the report: one dictionary per rank, ready for JSON."""

from mindformers_glm32k.dryrun.analysis import collectives, flops, memory, work
from mindformers_glm32k.dryrun.analysis.mindir import read_program
from mindformers_glm32k.dryrun.analysis.source_lines import SourceLines
from mindformers_glm32k.dryrun.analysis.trace import trace_program
from mindformers_glm32k.dryrun.report.advice import LARGE_CONSTANT

LARGEST = 10
_COMPRESSED_MASK = (2048, 2048)  # of the flash attention kernel, the same for every length


def analyze(path, text_folder, rank, stage, lengths=(), widths=()):
    """Reads one program.

    Args:
        path (pathlib.Path): MindIR file.
        text_folder (pathlib.Path): where the frontend wrote the program as text.
        rank (int), stage (int): whose program it is.
        lengths (Container[int]): sizes that an axis of positions has; tensors with two such axes are looked for.
        widths (Container[int]): sizes of the model's other axes, which are not to be taken for the length.

    Returns:
        dict: see README of the report's JSON in `report.py`; all sizes in bytes of one device, all counts of one step.
    """
    program = read_program(path)
    trace = trace_program(program)
    sources = SourceLines(text_folder, program)
    used = memory.measure(trace)
    operations = flops.count(trace)
    peak = used.peak_event
    return {
        "rank": rank,
        "stage": stage,
        "parameter_bytes": used.parameters["weights"],
        "parameter_count": used.parameter_count,
        "accumulator_bytes": used.parameters["accumulators"],
        "optimizer_bytes": used.parameters["optimizer"],
        "cache_bytes": used.parameters["cache"],
        "other_parameter_bytes": used.parameters["other"],
        "constant_bytes": used.constants,
        "input_bytes": used.inputs,
        "activation_peak_bytes": used.activation_peak,
        "total_bytes": used.total,
        "peak_at": sources.of(peak.node) if peak else "",
        "logits_bytes": _logits(trace, used),
        "flops": sum(operations.values()),
        "flops_by_part": {f"{what}_{part}": value for (what, part), value in sorted(operations.items())},
        "work": work.measure(trace),
        "collectives": [
            {
                "kind": item.kind,
                "group_ranks": list(item.group_ranks),
                "dtype": item.dtype,
                "bytes": item.bytes,
                "count": item.count,
                "purpose": item.purpose,
                "part": item.part,
            }
            for item in collectives.list_collectives(trace, rank)
        ],
        "largest_tensors": _largest(trace.activations + trace.constants, sources),
        "at_peak": _largest(used.at_peak, sources),
        "square_tensors": _largest(
            [
                buffer
                for buffer in trace.activations + trace.constants + trace.inputs
                if is_square(buffer.spec.shape, lengths, widths)
            ],
            sources,
        ),
        "large_constants": _largest(
            [buffer for buffer in trace.constants if buffer.spec.bytes > LARGE_CONSTANT], sources
        ),
        "operations": len(trace.events),
        "doubts": trace.doubts,
    }


def is_square(shape, lengths, widths=()):
    """Whether a tensor's last two axes are both positions of a row, as those of scores and masks are.

    Args:
        shape (tuple[int]): of the tensor.
        lengths (Container[int]): sizes that an axis of positions has.
        widths (Container[int]): other sizes of the model; when a length is one of them, only tensors of four axes
        count.

    Returns:
        bool
    """
    if len(shape) < 2 or shape == _COMPRESSED_MASK or not all(size in lengths for size in shape[-2:]):
        return False
    return len(shape) >= 4 or not any(size in widths for size in shape[-2:])


def _largest(buffers, sources):
    """The largest distinct tensors: one entry per shape, dtype and source line, with how many there are."""
    groups = {}
    for buffer in sorted(buffers, key=lambda item: -item.spec.bytes):
        operation = buffer.event.node.op if buffer.event else buffer.kind
        source = sources.of(buffer.event.node) if buffer.event else buffer.name.rsplit(":", 1)[-1]
        key = (buffer.spec.shape, buffer.spec.dtype, operation, source)
        if key not in groups and len(groups) == LARGEST:
            break
        groups.setdefault(key, [buffer, 0])[1] += 1
    return [
        {
            "shape": list(shape),
            "dtype": dtype,
            "bytes": buffer.spec.bytes,
            "operation": operation,
            "source": source,
            "count": count,
        }
        for (shape, dtype, operation, source), (buffer, count) in groups.items()
    ]


def _logits(trace, used):
    """Bytes of the buffers alive at the peak that the output layer and the loss made."""

    def is_logits(scope):
        return "output_layer" in scope or "CrossEntropy" in scope or "/loss-" in scope

    return sum(buffer.spec.bytes for buffer in used.at_peak if buffer.event and is_logits(buffer.event.node.scope))

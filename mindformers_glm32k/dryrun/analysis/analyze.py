"""From a compiled program to the figures of the report: one dictionary per rank, ready for JSON."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from mindformers_glm32k.dryrun.analysis.cost import count_flops, list_collectives, measure_work
from mindformers_glm32k.dryrun.analysis.memory import measure
from mindformers_glm32k.dryrun.analysis.mindir import read_program
from mindformers_glm32k.dryrun.analysis.source_lines import SourceLines
from mindformers_glm32k.dryrun.analysis.trace import trace_program

LARGEST = 10
LARGE_CONSTANT = 64 * 1024**2  # bytes
_COMPRESSED_MASK = (2048, 2048)  # of the flash attention kernel, the same for every length


def analyze(
    path: Path, text_folder: Path, rank: int, stage: int, lengths: Container[int] = (), widths: Container[int] = ()
) -> dict:
    """Reads one program.

    Args:
        path: MindIR file.
        text_folder: where the frontend wrote the program as text.
        rank, stage: whose program it is.
        lengths: sizes that an axis of positions has; tensors with two such axes are looked for.
        widths: sizes of the model's other axes, which are not to be taken for the length.

    Returns:
        A program of report.json; all sizes in bytes of one device, all counts of one step.
    """
    program = read_program(path)
    trace = trace_program(program)
    sources = SourceLines(text_folder, program)
    used = measure(trace)
    operations = count_flops(trace)
    peak = used.peak_event
    everything = trace.activations + trace.constants + trace.inputs
    squares = [buffer for buffer in everything if is_square(buffer.spec.shape, lengths, widths)]
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
        "work": measure_work(trace),
        "collectives": list_collectives(trace, rank),
        "largest_tensors": _largest(trace.activations + trace.constants, sources),
        "at_peak": _largest(used.at_peak, sources),
        "square_tensors": _largest(squares, sources),
        "large_constants": _largest([item for item in trace.constants if item.spec.bytes > LARGE_CONSTANT], sources),
        "operations": len(trace.events),
        "doubts": trace.unresolved,
    }


def is_square(shape: tuple[int, ...], lengths: Container[int], widths: Container[int] = ()) -> bool:
    """Whether a tensor's last two axes are both positions of a sequence, as those of scores and masks are.

    Args:
        shape: of the tensor.
        lengths: sizes that an axis of positions has.
        widths: other sizes of the model; when a length is one of them, only tensors of four axes count.
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

"""From a compiled program to the figures of the report: one dictionary per rank, ready for JSON."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

from mindformers_glm32k.dryrun.analysis.cost import (
    ATTENTION,
    MATRIX_PRODUCTS,
    count_flops,
    list_collectives,
    measure,
    measure_work,
    parameter_kind,
)
from mindformers_glm32k.dryrun.analysis.mindir import Node, Program, read_program
from mindformers_glm32k.dryrun.analysis.order import alive_at, by_order, live_bytes, peaks
from mindformers_glm32k.dryrun.analysis.trace import trace_program

LARGEST = 10
WEIGHTS = "parallel_optimizer"  # in the purpose of a collective that gathers weights or scatters their gradients
TERMS = ("gathered", "fresh", "logits")
_UPDATE = ("/clip_grad_norm-", "/optimizer-", "/learning_rate-")  # in the scope of what follows the backward pass
_LOSS = ("output_layer", "CrossEntropy", "/loss-")
LARGE_CONSTANT = 64 * 1024**2  # bytes
_COMPRESSED_MASK = (2048, 2048)  # of the flash attention kernel, the same for every length
_SCOPE = re.compile(r"# Fullname with scope: \((.*)\)\s*$")
# "# In file /a/b.py:12, 4~8/    x = y/" or ":12~14, 4~8/..."
_LINE = re.compile(r"# In file (\S+?):(\d+)(?:~\d+)?, \d+~\d+/(.*)/\s*$")
_OURS = ("mindformers_glm32k/", "mindformers/")


def analyze(
    path: Path, text_folder: Path, rank: int, stage: int, lengths: Container[int] = (), widths: Container[int] = ()
) -> dict:
    """Reads one program.

    Args:
        path: MindIR file.
        text_folder: where the frontend wrote the program as text.
        rank, stage: of the program.
        lengths: sizes of an axis of positions; tensors with two such axes are listed as square.
        widths: sizes of the model's other axes, which must not be taken for a length.

    Returns:
        A program of report.json; all sizes in bytes of one device, all counts of one step.
    """
    program = read_program(path)
    trace = trace_program(program)
    sources = SourceLines(text_folder, program)
    used, ordered = measure(trace), by_order(trace)
    operations = count_flops(trace)
    peak = used.peak_event
    everything = trace.activations + trace.constants + trace.inputs
    shapes = _weight_shapes(trace)
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
        "total_bytes_by_order": {
            order: used.total - used.activation_peak + peak for order, peak in peaks(trace, ordered).items()
        },
        "at_peak_by_order": {order: _at_peak(trace, events, shapes) for order, events in ordered.items()},
        "peak_at": sources.of(peak.node) if peak else "",
        "logits_bytes": _terms(used.at_peak, shapes)["logits"],
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
        lengths: sizes of an axis of positions.
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


def _at_peak(trace, events, shapes):
    """Peak bytes of an order, "passes" up to the last product or attention, "update" after it; `_terms` at "passes"."""
    curve = live_bytes(trace, events)
    products = [index for index, event in enumerate(events) if event.node.op in (*MATRIX_PRODUCTS, *ATTENTION)]
    end = products[-1] + 1 if products else len(events)
    passes = max(curve[:end], default=0)
    alive = alive_at(trace, events, curve.index(passes)) if curve else []
    return {"passes": passes, "update": max(curve[end:], default=0), **_terms(alive, shapes)}


def _terms(alive, shapes):
    """Bytes alive at a peak by kind: "gathered" weights, "fresh" gradients of weights (and their clipped copies),
    "logits" (results of output layer and loss); the rest is activations."""
    found = dict.fromkeys(TERMS, 0)
    for buffer in alive:
        node = buffer.event.node if buffer.event else None
        if node is None:
            continue
        if _is_gather(node):
            found["gathered"] += buffer.spec.bytes
        elif buffer.spec.shape in shapes or any(name in node.scope for name in _UPDATE):
            found["fresh"] += buffer.spec.bytes
        elif any(name in node.scope for name in _LOSS):
            found["logits"] += buffer.spec.bytes
    return found


def _is_gather(node):
    return node.op == "AllGather" and WEIGHTS in node.instance


def _weight_shapes(trace):
    """Shapes of the matrices that are trained, whole and as this device holds them."""
    whole = (buffer.spec.shape for event in trace.events if _is_gather(event.node) for buffer in event.writes)
    held = (buffer.spec.shape for buffer in trace.parameters if parameter_kind(buffer.name) == "weights")
    return {shape for shape in (*whole, *held) if len(shape) == 2}


class SourceLines:
    """Which line of source made an operation: from the validated program as text, joined to the program by scope.

    Args:
        folder: holds the text that the frontend wrote, in any sub-folder; may hold none.
        program: the program whose nodes are looked up.
    """

    def __init__(self, folder: Path, program: Program | None = None):
        self.lines = {}
        for path in sorted(Path(folder).rglob("*validate*.ir")):
            self._read(path)
        self.by_cell = {}
        for scope, lines in self.lines.items():
            if lines:
                self.by_cell.setdefault(_operation(scope), lines)
        if program is not None:
            self._renumber(program)

    def _renumber(self, program):
        """Text and program number the operators differently, in the same order: a cell's n-th of a kind is the same."""

        def by_kind(scopes):
            kinds = {}
            for scope in set(scopes):
                kind, _, number = scope.rpartition("-op")
                if kind and number.isdigit():
                    kinds.setdefault(kind, []).append(int(number))
            return {kind: sorted(numbers) for kind, numbers in kinds.items()}

        there = by_kind(node.scope for graph in (program.main, *program.graphs.values()) for node in graph.nodes)
        renumbered = {}
        for kind, numbers in by_kind(self.lines).items():
            if len(there.get(kind, ())) == len(numbers):
                for old, new in zip(numbers, there[kind]):
                    renumbered[f"{kind}-op{new}"] = self.lines[f"{kind}-op{old}"]
        self.lines = renumbered

    def _read(self, path):
        scope = None
        with open(path, encoding="utf-8", errors="replace") as text:
            for line in text:
                if "# " not in line:
                    scope = None if not line.lstrip().startswith(":") else scope
                    continue
                found = _SCOPE.search(line)
                if found:
                    scope = found.group(1)
                    self.lines.setdefault(scope, [])
                elif scope is not None:
                    found = _LINE.search(line)
                    if found:
                        path, line, code = found.groups()
                        self.lines[scope].append((path, line, code.split("/<~~", 1)[0]))  # a remark of the frontend's

    def of(self, node: Node) -> str:
        """Where a node comes from: "package/file.py:LINE text" of the innermost line in MindFormers or this package,
        else in MindSpore, else the node's scope."""
        lines = self.lines.get(node.scope) or self.by_cell.get(_operation(node.scope), ())
        calls = [(_short(path), line, text) for path, line, text in lines]
        ours = [call for call in calls if call[0].startswith(_OURS)]
        if not calls:
            return node.scope or node.op
        path, line, text = (ours or calls)[-1]
        return f"{path}:{line} {text.strip()}"


def _operation(scope):
    """(cell, operator) of the forward that an operation, its copy for recomputation or its gradient comes from."""
    cell, _, name = scope.rpartition("/")
    cell = cell[len("Gradients/") :] if cell.startswith("Gradients/") else cell
    cell = cell[len("recompute_") :] if cell.startswith("recompute_") else cell
    parent, _, last = cell.rpartition("/")
    if last.startswith("Grad_"):
        return parent, last[len("Grad_") :]
    return cell, re.sub(r"-op\d+$", "", name)


def _short(path):
    """The path from the package's name on."""
    for name in ("mindformers_glm32k/", "mindformers/", "mindspore/"):
        at = path.rfind("/" + name)
        if at >= 0:
            return path[at + 1 :]
    return path

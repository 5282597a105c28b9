"""Device memory of a traced program: what stays for the whole run, and the peak of what comes and goes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mindformers_glm32k.dryrun.analysis.trace import Buffer, Event, Trace
from mindformers_glm32k.weights.names import SCRATCH_PREFIX, STATE_PREFIXES


@dataclass
class Memory:
    """Bytes on one device.

    Args:
        parameters: by kind: "weights", "accumulators", "optimizer", "cache", "other".
        parameter_count: elements of the weights that this device holds.
        constants: tensors that the program carries with it.
        inputs: the step's data.
        activation_peak: largest sum of buffers alive at one time.
        peak_event: when that is.
        at_peak: the buffers alive then, largest first.
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
        """What the device needs at the peak."""
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

    The peak comes from the life of every buffer in program order: from the operation that writes it to the last one
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

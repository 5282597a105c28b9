"""Step time of a set of compiled programs on an Atlas 800T A2, estimated. No NPU is measured here.

A roofline over what the programs hold, recomputation included: matrix products and attention (causal) at one fraction
of the peak, all other operators at the memory's bandwidth, collectives at the links' bandwidth, one after the other;
then the pipeline's bubble. The fraction is calibrated on one published figure; the error on the others stands beside
every estimate.

Sources of the device's figures
    [model]  Ascend/msmodeling (Huawei's performance modelling tool), tensor_cast/device.py, profile
             ATLAS_800_A2_313T_64G: 313 TFLOPS float16, 294.9 bfloat16, 83 float32; HBM 1.6 TiB/s, of which 0.6 is
             reached; full mesh of 8 NPUs with 196 GB/s in each direction, that is 28 GB/s over each of 7 links; 25 GB/s
             between machines, of which 0.7 is reached; 10 microseconds to start a collective.
    [bench]  gameofdimension/limulidae, README: measured on 910B, all_gather of N bytes in N / (38, 64, 149 GB/s) over
             2, 4, 8 devices, all_reduce in N / (18, 30, 72 GB/s). With N / devices over each link at once this is 0.57
             to 0.68 of 28 GB/s a link.
The same server is sold with 376 and 280 TFLOPS too; which one the published figures come from is not known. The
fraction is calibrated, so that another peak gives the same seconds.

Published speeds (published.json) for this model at 32768 tokens on 8 cards of an Atlas 800T A2, in tokens/s and card
    1758, 1442, 1583   research/glm32k/glm32k.md of MindFormers on 28 June, 9 September and 26 October 2024, dp 2 x pp 4
                       with recompute, 16 micro batches. One YAML, other versions of the software: they differ by 22 %.
    2501               Megatron on the same NPUs, cp 8 (Ulysses) without recompute. The public script for it (ModelLink,
                       now MindSpeed-LLM: examples/mcore/chatglm3/pretrain_chatglm3_6B_32K.sh) accumulates 32 sequences
                       a step.
published.json also holds the reports of the compiled programs, one rank of each stage, extrapolated from 2 and 4 layers
a stage. CARD is upstream's model card: fp32 residual, vocabulary split over dp, whole logits,
`recompute_slice_activation`. ULYSSES is `finetune_glm32k_cp8.yaml` with 32 sequences a step: the first sequence, plus
31 times what the second one of `--runner_config.gradient_accumulation_steps 2` adds. The YAML itself takes one sequence
a step and pays for the optimizer's communication with each.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mindformers_glm32k.errors import InputError

FRACTION = 0.676  # of the peak, from calibrate()
PARTS = ("matmul", "attention", "vector", "communication", "bubble")
WORK = PARTS[:-1]
# Of `fitted`, from search.calibrate: seconds over those at the device's peaks by kind of work (of communication, the
# share not hidden behind other work), root mean square of log(estimate / figure), number of figures.
FITTED = {"matmul": 1.244, "attention": 1.7, "vector": 1.036, "communication": 0.564}
SPREAD = 0.163
FIGURES = 16
_NINE_IN_TEN = 1.645  # standard deviations


@dataclass(frozen=True)
class Device:
    """One NPU and its links; rates are bytes/s that are reached in one direction, not peaks.

    Args:
        name: for the report.
        flops: peak FLOP/s of matrix products by dtype.
        memory: of memory-bound operators.
        link: of one link between two NPUs of a machine.
        network: of an NPU's port to other machines.
        start: seconds to start a collective.
        per_machine: NPUs of a machine.
    """

    name: str
    flops: dict[str, float] = field(hash=False)
    memory: float
    link: float
    network: float
    start: float
    per_machine: int


ATLAS_800T_A2 = Device(
    name="Atlas 800T A2 (313 TFLOPS float16, 64 GB)",
    flops={"float16": 313e12, "bfloat16": 294.9e12, "float32": 83e12},
    memory=0.6 * 1.6 * 1024**4,  # [model]
    link=0.65 * 28e9,  # [model], the share from [bench]
    network=0.7 * 25e9,  # [model]
    start=10e-6,  # [model]
    per_machine=8,
)


@dataclass(frozen=True)
class Published:
    """A published speed in tokens per second and card, and the report of the programs behind it."""

    what: str
    speed: int
    report: dict


def estimate(report: dict, device: Device = ATLAS_800T_A2, fraction: float = FRACTION) -> dict:
    """Estimates a training step.

    With m micro batches and t_i seconds of a micro batch on stage i, a step of 1F1B takes (m - 1) x max t + sum t: with
    equal stages that is (m + stages - 1) / m times a stage's own work. With `interleave` virtual stages a stage, the
    bubble is divided by their number.

    Args:
        report: with programs of every stage, `layout_sizes` and `tokens_per_step`.
        device: what it runs on.
        fraction: of the peak that matrix products and attention reach.

    Returns:
        "step_seconds", "tokens_per_second_per_device", "parts" (seconds of the slowest stage's matmul, attention,
        vector and communication, and of the bubble; they add up to the step), "stages" (the same parts of each),
        "slowest_stage", "device".

    Raises:
        InputError: a stage is missing.
    """
    micro_batches = report["layout_sizes"]["micro_batches"]
    stages = [
        max((seconds_of_program(program, device, fraction) for program in programs), key=lambda it: sum(it.values()))
        for programs in stages_of(report)
    ]
    totals = [sum(parts.values()) for parts in stages]
    slowest = totals.index(max(totals))
    bubble = (sum(totals) - totals[slowest]) / micro_batches / report["layout_sizes"].get("interleave", 1)
    step = totals[slowest] + bubble
    return {
        "step_seconds": step,
        "tokens_per_second_per_device": report["tokens_per_step"] / report["world_size"] / step,
        "parts": {**stages[slowest], "bubble": bubble},
        "stages": stages,
        "slowest_stage": slowest,
        "device": device.name,
    }


def at_peak(report: dict, device: Device = ATLAS_800T_A2) -> dict[str, float]:
    """Seconds of a step by kind of work at the device's peaks, without overlap, the bubble distributed over them."""
    parts = estimate(report, device, fraction=1.0)["parts"]
    own = sum(parts[kind] for kind in WORK)
    return {kind: parts[kind] * (1 + parts["bubble"] / own) for kind in WORK}


def fitted(report: dict, device: Device = ATLAS_800T_A2) -> dict:
    """A second estimate: the same work, with an efficiency for each kind, fitted to FIGURES published ones.

    Returns:
        "step_seconds", "tokens_per_second_per_device", and "interval" of the latter, which holds nine in ten of the
        figures that are left out of the fit.
    """
    step = sum(FITTED[kind] * seconds for kind, seconds in at_peak(report, device).items())
    speed = report["tokens_per_step"] / report["world_size"] / step
    factor = math.exp(_NINE_IN_TEN * SPREAD)
    return {"step_seconds": step, "tokens_per_second_per_device": speed, "interval": [speed / factor, speed * factor]}


def estimate_with_note(report: dict) -> dict:
    """`estimate`, "fitted" and "note", without which no estimate is shown."""
    return {**estimate(report), "fitted": fitted(report), "note": note()}


def seconds_of_program(program: dict, device: Device, fraction: float) -> dict[str, float]:
    """Seconds of one device's step by part ("matmul", "attention", "vector", "communication"), without the bubble."""
    work = program["work"]

    def cube(operations: dict[str, float]) -> float:
        peaks = device.flops
        return sum(count / (fraction * peaks.get(dtype, peaks["float32"])) for dtype, count in operations.items())

    return {
        "matmul": cube(work["matmul_flops"]),
        "attention": cube(work["attention_flops"]),
        "vector": work["vector_bytes"] / device.memory,
        "communication": sum(
            seconds_of_collective(device, item["kind"], item["group_ranks"], item["bytes"], item["count"])
            for item in program["collectives"]
        ),
    }


def seconds_of_collective(device: Device, kind: str, ranks: Sequence[int], total_bytes: float, count: int) -> float:
    """Time that collectives of one kind over one group take, none of it hidden behind other work.

    Inside a machine every pair of NPUs has its own link, so a group of n moves n - 1 chunks of 1/n at once. Between
    machines, the members of a machine split the traffic over their ports.

    Args:
        device: the NPU.
        kind: "AllReduce", …; Send costs nothing here: the Receive on the other side is what a program waits for.
        ranks: the group; with one rank it is a copy in the device's own memory.
        total_bytes: over all calls, of the larger of what a call reads and writes.
        count: calls.
    """
    if kind == "Send":
        return 0.0
    size = max(len(ranks), 1)
    if size == 1:
        return 2 * total_bytes / device.memory + count * device.start
    machines = len({rank // device.per_machine for rank in ranks})
    local = size / machines
    if kind in ("Receive", "Broadcast"):
        seconds = total_bytes / (device.link if machines == 1 else device.network)
    else:
        seconds = total_bytes / size / device.link if local > 1 else 0.0
        if machines > 1:
            moved = total_bytes if kind.lower().startswith("alltoall") else total_bytes / local
            seconds += moved * (machines - 1) / machines / device.network
        if kind == "AllReduce":  # scatter and gather
            seconds *= 2
    return seconds + count * device.start


def stages_of(report: dict) -> list[list[dict]]:
    """Programs of stage 0, 1, …

    Raises:
        InputError: a stage has none.
    """
    stages = [
        [program for program in report["programs"] if program["stage"] == stage]
        for stage in range(report["layout_sizes"]["stages"])
    ]
    missing = [str(stage) for stage, programs in enumerate(stages) if not programs]
    if missing:
        raise InputError(
            f"{report['config']}: the report has no program of stage {', '.join(missing)}; "
            "run the dry run with --rank stages"
        )
    return stages


@functools.cache
def published() -> tuple[Published, ...]:
    """The published speeds; the first is what FRACTION is calibrated on."""
    data = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return tuple(
        Published(item["what"], item["tokens_per_second_per_device"], data["reports"][item["report"]])
        for item in data["figures"]
    )


def calibrate() -> float:
    """The fraction of the peak with which the first published speed comes out exactly; FRACTION is this, rounded."""
    target = published()[0]
    low, high = 0.05, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        found = estimate(target.report, ATLAS_800T_A2, middle)["tokens_per_second_per_device"]
        low, high = (middle, high) if found < target.speed else (low, middle)
    return low


def errors() -> list[tuple[Published, float, float]]:
    """The figures that the estimate is not calibrated on, each with the estimate and its relative error."""
    compared = []
    for figure in published()[1:]:
        found = estimate(figure.report)["tokens_per_second_per_device"]
        compared.append((figure, found, found / figure.speed - 1))
    return compared


def note() -> str:
    """What must stand beside every estimate."""
    first = published()[0]
    others = "; ".join(
        f"{figure.what}: published {figure.speed}, estimated {found:.0f} ({error:+.0%})"
        for figure, found, error in errors()
    )
    return (
        f"Speeds are estimates, not a measurement: a roofline of the compiled programs for {ATLAS_800T_A2.name}, "
        f"matrix products and attention at {FRACTION:.0%} of the peak, calibrated on one published figure "
        f"({first.what}: {first.speed} tokens/s/p). On the others: {others}. A second estimate, with an efficiency for "
        f"each kind of work fitted to {FIGURES} published figures, is off by "
        f"{math.expm1(SPREAD):.0%} (root mean square) on figures left out of the fit."
    )

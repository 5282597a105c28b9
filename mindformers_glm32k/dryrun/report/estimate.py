"""Step time of a set of compiled programs on an Atlas 800T A2, estimated. No NPU is measured here.

A roofline over what the programs hold, recomputation included: matrix products and attention (causal) at one fraction of the
peak, all other operators at the memory's bandwidth, collectives at the links' bandwidth, one after the other; then the
pipeline's bubble. The fraction is calibrated on one published figure; what is printed comes from `calibration.py`, which adds
the error on the other published figures.
"""

from mindformers_glm32k.dryrun.report.hardware import ATLAS_800T_A2, seconds_of_collective
from mindformers_glm32k.errors import InputError

FRACTION = 0.676  # of the peak, from calibration.solve()
PARTS = ("matmul", "attention", "vector", "communication", "bubble")


def estimate(report, device=ATLAS_800T_A2, fraction=FRACTION):
    """Estimates a training step.

    With m micro batches and t_i seconds of a micro batch on stage i, a step of 1F1B takes (m - 1) x max t + sum t: with
    stages alike that is (m + stages - 1) / m of a stage's own work.

    Args:
        report (dict): with programs of every stage, `layout_sizes` and `tokens_per_step`.
        device (Device): what it runs on.
        fraction (float): of the peak that matrix products and attention reach.

    Returns:
        dict: "step_seconds", "tokens_per_second_per_device", "parts" (seconds of the slowest stage's matmul, attention, vector
        and communication, and of the bubble; they add up to the step), "stages" (the same parts of each), "slowest_stage",
        "device".

    Raises:
        InputError: a stage is missing.
    """
    micro_batches = report["layout_sizes"]["micro_batches"]
    stages = [
        max(
            (seconds_of_program(program, device, fraction) for program in programs),
            key=lambda parts: sum(parts.values()),
        )
        for programs in stages_of(report)
    ]
    totals = [sum(parts.values()) for parts in stages]
    slowest = totals.index(max(totals))
    bubble = (sum(totals) - totals[slowest]) / micro_batches
    step = totals[slowest] + bubble
    return {
        "step_seconds": step,
        "tokens_per_second_per_device": report["tokens_per_step"] / report["world_size"] / step,
        "parts": {**stages[slowest], "bubble": bubble},
        "stages": stages,
        "slowest_stage": slowest,
        "device": device.name,
    }


def seconds_of_program(program, device, fraction):
    """Seconds of one device's step without the bubble, by part.

    Args:
        program (dict): of a report.
        device (Device), fraction (float): see `estimate`.

    Returns:
        dict[str, float]: "matmul", "attention", "vector", "communication".
    """
    work = program["work"]

    def cube(operations):
        return sum(
            count / (fraction * device.flops.get(dtype, device.flops["float32"])) for dtype, count in operations.items()
        )

    return {
        "matmul": cube(work["matmul_flops"]),
        "attention": cube(work["attention_flops"]),
        "vector": work["vector_bytes"] / device.memory,
        "communication": sum(
            seconds_of_collective(device, item["kind"], item["group_ranks"], item["bytes"], item["count"])
            for item in program["collectives"]
        ),
    }


def stages_of(report):
    """Programs by stage.

    Args:
        report (dict): of a dry run.

    Returns:
        list[list[dict]]: of stage 0, 1, …

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

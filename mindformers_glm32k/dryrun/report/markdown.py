"""report.md: what an engineer who books NPUs wants to know, from report.json."""

import json

from mindformers_glm32k.dryrun.report.advice import GIB, device_memory, purpose, warnings_of
from mindformers_glm32k.files import atomic_path

PICTURE = "report.png"
# key of a program in report.json -> what it is called; together they are "total_bytes"
MEMORY = (
    ("parameter_bytes", "parameters"),
    ("accumulator_bytes", "gradient accumulators"),
    ("optimizer_bytes", "optimizer states"),
    ("cache_bytes", "key-value cache"),
    ("constant_bytes", "constants"),
    ("activation_peak_bytes", "activations at the peak"),
    ("rest_bytes", "inputs and counters"),
)
_LARGEST_SHOWN = 5
_COLLECTIVES_SHOWN = 12


def memory_parts(program):
    """Bytes of a program by part, adding up to its total.

    Args:
        program (dict): of report.json.

    Returns:
        dict[str, int]: by the names of MEMORY.
    """
    program = {**program, "rest_bytes": program["input_bytes"] + program["other_parameter_bytes"]}
    return {name: program[key] for key, name in MEMORY}


def title(program):
    """What a program is called: "stage 3, rank 6", with the phase of a prediction."""
    phase = program.get("phase", "train")
    return f"stage {program['stage']}, rank {program['rank']}" + (f", {phase}" if phase != "train" else "")


def write_report(report, config, folder):
    """Adds what follows from the figures, and writes report.json, report.md and report.png.

    Args:
        report (dict): layout and programs; changed in place: "max_device_memory_bytes" (None where the YAML sets none),
            "estimate" (None for prediction or when a stage has no program) and "warnings" are added.
        config (dict): the merged configuration.
        folder (pathlib.Path): where the files go.
    """
    from mindformers_glm32k.dryrun.report.plot import draw

    report["max_device_memory_bytes"] = device_memory(config)
    report["estimate"] = _estimate(report)
    report["warnings"] = warnings_of(report, config)
    for name, text in (("report.json", json.dumps(report, indent=1)), ("report.md", render(report))):
        with atomic_path(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    draw(report, folder / PICTURE)


def _estimate(report):
    from mindformers_glm32k.dryrun.report import calibration
    from mindformers_glm32k.dryrun.report.estimate import estimate

    stages = {program["stage"] for program in report["programs"]}
    if report["run_mode"] not in ("train", "finetune") or len(stages) < report["layout_sizes"]["stages"]:
        return None
    return {**estimate(report), "note": calibration.note()}


def render(report):
    """The report as Markdown.

    Args:
        report (dict): complete, as written to report.json.

    Returns:
        str
    """
    sections = [
        _head(report),
        _warnings(report["warnings"]),
        f"![Memory and traffic of each program]({PICTURE})",
        _memory(report),
        _speed(report),
        _traffic(report),
        _peaks(report),
        _how(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(report):
    count = report["world_size"]
    lines = [
        f"# Dry run of {report['config']}",
        "",
        f"{report['layout'] + f' on {count} NPUs' if count > 1 else 'One NPU'}, run mode {report['run_mode']}, "
        f"rows of {report['layout_sizes']['seq_length']:,} tokens, "
        f"{report['layout_sizes']['layers']} layers.",
    ]
    if report["run_mode"] in ("train", "finetune"):
        lines[-1] += f" A step reads {report['tokens_per_step']:,} tokens."
    worst = max(report["programs"], key=lambda program: program["total_bytes"])
    limit = report["max_device_memory_bytes"]
    room = f" of the {limit / GIB:.1f} GiB that max_device_memory allows" if limit else ""
    lines += ["", f"The fullest card needs **{_size(worst['total_bytes'], GIB)} GiB**{room} ({title(worst)})."]
    stand_ins = [text for program in report["programs"] for text in program.get("stand_ins", ())]
    lines += [f"\n{text}" for text in dict.fromkeys(stand_ins)]
    return "\n".join(lines)


def _warnings(warnings):
    if not warnings:
        return "## Warnings\n\nNone."
    return "## Warnings\n\n" + "\n".join(f"- **{item['what']}.** {item['fix']}" for item in warnings)


def three_digits(value):
    """str: 33.5, 0.00412, 14443: three significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:#.3g}"


def _size(count, unit):
    return three_digits(count / unit)


def _table(head, rows, texts=1):
    """Markdown; the first `texts` columns are words, the others numbers."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _memory(report):
    limit = report["max_device_memory_bytes"]
    programs = report["programs"]
    shown = [name for name in memory_parts(programs[0]) if any(memory_parts(program)[name] for program in programs)]
    rows = []
    for program in programs:
        parts = memory_parts(program)
        share = [f"{100 * program['total_bytes'] / limit:.0f} %"] if limit else []
        rows.append(
            [
                title(program),
                f"{program['parameter_count']:,}",
                *(_size(parts[name], GIB) for name in shown),
                _size(program["logits_bytes"], GIB),
                f"**{_size(program['total_bytes'], GIB)}**",
                *share,
            ]
        )
    head = [
        "program",
        "parameters held",
        *(f"{name}, GiB" for name in shown),
        "of activations: logits, GiB",
        "**total, GiB**",
        *(["of max_device_memory"] if limit else []),
    ]
    return "## Memory of one card\n\n" + _table(head, rows)


def _speed(report):
    rows = [
        [
            title(program),
            _size(program["flops"], 1e12),
            _size(_part(program, "matmul"), 1e12),
            _size(_part(program, "attention"), 1e12),
            f"{100 * _part(program, '', 'recompute') / max(program['flops'], 1):.0f} %",
            _size(sum(item["bytes"] for item in program["collectives"]), 1e9),
            f"{program['operations']:,}",
        ]
        for program in report["programs"]
    ]
    text = "## Work of one card in a step\n\n" + _table(
        [
            "program",
            "TFLOPs",
            "of it matrix products",
            "of it attention (all pairs)",
            "recomputed",
            "traffic, GB",
            "operations",
        ],
        rows,
    )
    estimate = report.get("estimate")
    if estimate:
        speed = estimate["tokens_per_second_per_device"]
        text += (
            f"\n\nEstimate, not a measurement: **{speed:.0f} tokens/s/p**, a step of "
            f"{estimate['step_seconds']:.2f} s on {estimate['device']}. {estimate['note']}"
        )
    return text


def _part(program, what, part=""):
    """FLOPs of "matmul" or "attention", of "forward", "backward" or "recompute"."""
    return sum(
        count for name, count in program["flops_by_part"].items() if name.startswith(what) and name.endswith(part)
    )


def _traffic(report):
    parts = []
    for program in report["programs"]:
        items = program["collectives"]
        if not items:
            continue
        rows = [
            [
                item["kind"] + purpose(item),
                item["part"],
                _ranks(item["group_ranks"]),
                item["dtype"],
                item["count"],
                _size(item["bytes"], 1e9),
            ]
            for item in items[:_COLLECTIVES_SHOWN]
        ]
        if len(items) > _COLLECTIVES_SHOWN:
            rest = items[_COLLECTIVES_SHOWN:]
            rows.append(
                [
                    f"{len(rest)} more",
                    "",
                    "",
                    "",
                    sum(item["count"] for item in rest),
                    _size(sum(item["bytes"] for item in rest), 1e9),
                ]
            )
        parts.append(
            f"### {title(program)[0].upper() + title(program)[1:]}\n\n"
            + _table(["collective", "part", "ranks", "dtype", "calls", "GB"], rows, texts=4)
        )
    return "\n\n".join(["## Traffic of one card in a step", *parts]) if parts else ""


def _ranks(ranks):
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}–{ranks[-1]}"
    return ", ".join(map(str, ranks))


def _peaks(report):
    parts = []
    for program in report["programs"]:
        rows = [
            [
                f"`{item['source'].replace('|', '¦')}`",
                str(item["shape"]),
                item["dtype"],
                item["count"],
                _size(item["bytes"] * item["count"], GIB),
            ]
            for item in program["at_peak"][:_LARGEST_SHOWN]
        ]
        heading = f"### {title(program)[0].upper() + title(program)[1:]}"
        parts.append(
            f"{heading}\n\nThe peak is at `{program['peak_at']}`.\n\n"
            + _table(["line", "shape", "dtype", "how many", "GiB in all"], rows, texts=3)
        )
    return "\n\n".join(["## The largest tensors at the peak", *parts])


def _how(report):
    programs = report["programs"]
    seconds = sum(program["compile_seconds"] for program in programs)
    return (
        "## How this was found\n\nThe programs that the NPUs would run were compiled on this machine by MindSpore's "
        "own frontend, from the same YAML and through the same trainer, and read: every tensor's life, every "
        "operation, every collective. Not in the figures: workspaces of kernels, buffers of the communication "
        f"library, what the backend fuses away, fragmentation. Compiling took {seconds:.0f} s and "
        f"{max(program['peak_rss_bytes'] for program in programs) / GIB:.1f} GiB."
    )

"""report.md and report.png: what an engineer who books NPUs wants to know, from report.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mindformers_glm32k.dryrun.report.advice import GIB, device_bytes, purpose
from mindformers_glm32k.dryrun.report.estimate import FIGURES
from mindformers_glm32k.files import atomic_path

PLOT = "report.png"
# key of a program in report.json -> label; together they are "total_bytes"
MEMORY = (
    ("parameter_bytes", "parameters"),
    ("accumulator_bytes", "gradient accumulators"),
    ("optimizer_bytes", "optimizer states"),
    ("cache_bytes", "key-value cache"),
    ("constant_bytes", "constants"),
    ("activation_peak_bytes", "activations at the peak"),
    ("rest_bytes", "inputs and counters"),
)
# key of total_bytes_by_order -> label
ORDER_NAMES = {"file": "file's order", "bfs": "bfs", "dfs": "dfs", "best": "best known order"}
_LARGEST_SHOWN = 5
_COLLECTIVES_SHOWN = 12
_COLORS = ("#4878d0", "#6acc64", "#ee854a", "#8c613c", "#797979", "#d65f5f", "#d5bb67", "#956cb4", "#82c6e2", "#dc7ec0")
_HEIGHT_OF_BAR = 0.55


def memory_parts(program: dict) -> dict[str, int]:
    """Bytes of a program by part, under the names of MEMORY, adding up to its total."""
    program = {**program, "rest_bytes": program["input_bytes"] + program["other_parameter_bytes"]}
    return {name: program[key] for key, name in MEMORY}


def traffic_by_kind(program: dict) -> dict[str, int]:
    """Bytes of a program's collectives by kind; groups of one rank are kinds of their own: nothing leaves the card."""
    sums = {}
    for item in program["collectives"]:
        kind = "Send and Receive" if item["kind"] in ("Send", "Receive") else item["kind"]
        kind += " of one rank" if len(item["group_ranks"]) == 1 else ""
        sums[kind] = sums.get(kind, 0) + item["bytes"]
    return sums


def title(program: dict) -> str:
    """The title of a program: "stage 3, rank 6", with the phase of a prediction."""
    phase = program.get("phase", "train")
    return f"stage {program['stage']}, rank {program['rank']}" + (f", {phase}" if phase != "train" else "")


def three_digits(value: float) -> str:
    """33.5, 0.00412, 14443: three significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:#.3g}"


def table(head: list[str], lines: Iterable[Iterable], texts: int = 1) -> str:
    """A table in Markdown; the first `texts` columns aligned left, the others (figures) right."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def render(report: dict) -> str:
    """A complete report, as written to report.json, as Markdown."""
    sections = [
        _head(report),
        _warnings(report["warnings"]),
        f"![Memory and traffic of each program]({PLOT})",
        _memory(report),
        _orders(report),
        _work(report),
        _traffic(report),
        _peaks(report),
        _how(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _size(count, unit):
    return three_digits(count / unit)


def _head(report):
    count, sizes = report["world_size"], report["layout_sizes"]
    lines = [
        f"# Dry run of {report['config']}",
        "",
        f"{report['layout'] + f' on {count} NPUs' if count > 1 else 'One NPU'}, run mode {report['run_mode']}, "
        f"sequences of {sizes['seq_length']:,} tokens, {sizes['layers']} layers.",
    ]
    if report["run_mode"] in ("train", "finetune"):
        lines[-1] += f" A step reads {report['tokens_per_step']:,} tokens."
    worst = max(report["programs"], key=device_bytes)
    limit = report["max_device_memory_bytes"]
    room = f" of the {limit / GIB:.1f} GiB that max_device_memory allows" if limit else ""
    lines += ["", f"The fullest card needs **{_size(device_bytes(worst), GIB)} GiB**{room} ({title(worst)})."]
    placeholders = [text for program in report["programs"] for text in program.get("stand_ins", ())]
    lines += [f"\n{text}" for text in dict.fromkeys(placeholders)]
    return "\n".join(lines)


def _warnings(warnings):
    if not warnings:
        return "## Warnings\n\nNone."
    return "## Warnings\n\n" + "\n".join(f"- **{item['what']}.** {item['fix']}" for item in warnings)


def _memory(report):
    limit = report["max_device_memory_bytes"]
    parts = [memory_parts(program) for program in report["programs"]]
    shown = [name for name in parts[0] if any(sizes[name] for sizes in parts)]
    lines = [
        [
            title(program),
            f"{program['parameter_count']:,}",
            *(_size(sizes[name], GIB) for name in shown),
            _size(program["logits_bytes"], GIB),
            f"**{_size(program['total_bytes'], GIB)}**",
            *([f"{100 * program['total_bytes'] / limit:.0f} %"] if limit else []),
        ]
        for program, sizes in zip(report["programs"], parts)
    ]
    head = ["program", "parameters held", *(f"{name}, GiB" for name in shown), "of activations: logits, GiB"]
    head += ["**total, GiB**", *(["of max_device_memory"] if limit else [])]
    return "## Memory of one card\n\n" + table(head, lines)


def _orders(report):
    programs = [program for program in report["programs"] if program.get("total_bytes_by_order")]
    if not programs:
        return ""
    lines = []
    for program in programs:
        totals = program["total_bytes_by_order"]
        lines.append([title(program), *(_size(totals[order], GIB) for order in ORDER_NAMES)])
    return (
        "## Memory of one card by execution order\n\n"
        + table(["program", *(f"{name}, GiB" for name in ORDER_NAMES.values())], lines)
        + "\n\nThe other figures of this report follow the order of the program's file. With jit_level O0 and O1, "
        "MindSpore sorts the kernels anew: `context.exec_order` bfs (the default) or dfs. The best known order is what "
        "a scheduler with a view of the whole step reaches; dependencies in the model can force it."
    )


def _work(report):
    lines = [
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
    head = ["program", "TFLOPs", "of it matrix products", "of it attention (all pairs)", "recomputed", "traffic, GB"]
    text = "## Work of one card in a step\n\n" + table([*head, "operations"], lines)
    estimate = report.get("estimate")
    if estimate:
        speed, fitted = estimate["tokens_per_second_per_device"], estimate["fitted"]
        low, high = (f"{bound:.0f}" for bound in fitted["interval"])
        text += (
            f"\n\nEstimates, not a measurement: **{speed:.0f} tokens/s/p**, a step of "
            f"{estimate['step_seconds']:.2f} s on {estimate['device']}; by the fit to {FIGURES} figures "
            f"{fitted['tokens_per_second_per_device']:.0f}, nine times in ten {low} to {high}. "
            f"{estimate['note']}"
        )
    return text


def _part(program, what, part=""):
    """FLOPs of "matmul" or "attention", of "forward", "backward" or "recompute"."""
    counts = program["flops_by_part"].items()
    return sum(count for name, count in counts if name.startswith(what) and name.endswith(part))


def _traffic(report):
    parts = []
    for program in report["programs"]:
        items = program["collectives"]
        if not items:
            continue
        lines = [
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
        rest = items[_COLLECTIVES_SHOWN:]
        if rest:
            calls, moved = (sum(item[key] for item in rest) for key in ("count", "bytes"))
            lines.append([f"{len(rest)} more", "", "", "", calls, _size(moved, 1e9)])
        head = ["collective", "part", "ranks", "dtype", "calls", "GB"]
        parts.append(f"{_heading(program)}\n\n{table(head, lines, texts=4)}")
    return "\n\n".join(["## Traffic of one card in a step", *parts]) if parts else ""


def _heading(program):
    return f"### {title(program)[0].upper()}{title(program)[1:]}"


def _ranks(ranks):
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}–{ranks[-1]}"
    return ", ".join(map(str, ranks))


def _peaks(report):
    parts = []
    for program in report["programs"]:
        lines = [
            [
                f"`{item['source'].replace('|', '¦')}`",
                str(item["shape"]),
                item["dtype"],
                item["count"],
                _size(item["bytes"] * item["count"], GIB),
            ]
            for item in program["at_peak"][:_LARGEST_SHOWN]
        ]
        largest = table(["line", "shape", "dtype", "how many", "GiB in all"], lines, texts=3)
        parts.append(f"{_heading(program)}\n\nThe peak is at `{program['peak_at']}`.\n\n{largest}")
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


def draw(report: dict, path: Path) -> None:
    """Draws the plot of a complete report into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    programs = report["programs"][::-1]  # the first on top
    names = [title(program) for program in programs]
    figure = pyplot.figure(figsize=(13, 2.4 + 0.5 * len(programs)), layout="constrained")
    halves = figure.subfigures(1, 2, width_ratios=(3, 2))
    memory, traffic = (half.subplots() for half in halves)
    parts = [memory_parts(program) for program in programs]
    _stack(memory, names, {part: [sizes[part] / GIB for sizes in parts] for part in parts[0]})
    limit, largest = report["max_device_memory_bytes"], max(program["total_bytes"] for program in programs)
    if limit and largest > limit / 20:  # else the bars could not be seen
        memory.axvline(
            limit / GIB, color="black", linestyle="--", linewidth=1, label=f"max_device_memory {limit / GIB:.0f} GiB"
        )
        largest = max(limit, largest)
    memory.set_xlim(0, largest / GIB * 1.12)
    memory.set_title("memory of one card")
    memory.set_xlabel("GiB")

    kinds = [traffic_by_kind(program) for program in programs]
    order = sorted({kind for sizes in kinds for kind in sizes}, key=lambda kind: -sum(it.get(kind, 0) for it in kinds))
    _stack(traffic, names, {kind: [sizes.get(kind, 0) / 1e9 for sizes in kinds] for kind in order})
    traffic.set_title("traffic of one card in a step" if order else "no traffic")
    traffic.set_xlabel("GB")
    for half, axes in zip(halves, (memory, traffic)):
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            half.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{report['config'].rsplit('/', 1)[-1]}: {report['layout']} (compiled, not measured)", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)


def _stack(axes, names, series):
    """Stacked horizontal bars; each part that is wide enough says its size, the end of a bar the sum."""
    totals = [sum(values) for values in zip(*series.values())] or [0] * len(names)
    scale = max(totals)
    if not scale:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.5, len(names) - 0.5)
        axes.set_xlim(0, 1)
        return
    left = [0.0] * len(names)
    for index, (label, values) in enumerate(series.items()):
        if any(values):
            color = _COLORS[index % len(_COLORS)]
            bars = axes.barh(names, values, left=left, height=_HEIGHT_OF_BAR, label=label, color=color)
            texts = [three_digits(value) if value > 0.07 * scale else "" for value in values]
            axes.bar_label(bars, texts, label_type="center", color="white", fontsize=8)
            left = [start + value for start, value in zip(left, values)]
    for bar, total in enumerate(totals):
        axes.text(total + 0.01 * scale, bar, three_digits(total), va="center", fontsize=9, fontweight="bold")
    axes.set_xlim(0, 1.15 * scale)
    axes.spines[["top", "right"]].set_visible(False)

"""report.png: memory of each program against what a card has, and its traffic by kind."""

from __future__ import annotations

from pathlib import Path

from mindformers_glm32k.dryrun.report.advice import GIB
from mindformers_glm32k.dryrun.report.markdown import memory_parts, three_digits, title, traffic_by_kind
from mindformers_glm32k.files import atomic_path

_COLORS = ("#4878d0", "#6acc64", "#ee854a", "#8c613c", "#797979", "#d65f5f", "#d5bb67", "#956cb4", "#82c6e2", "#dc7ec0")
_HEIGHT_OF_BAR = 0.55


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

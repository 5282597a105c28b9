"""Layouts side by side: memory, traffic, work and estimated speed of dry runs."""

import json
from collections import defaultdict
from pathlib import Path

from mindformers_glm32k.dryrun.report import calibration
from mindformers_glm32k.dryrun.report.estimate import PARTS, stages_of
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file

GIB = 1024**3
REPORT = "report.json"


def read_report(folder):
    """A finished report.

    Args:
        folder (pathlib.Path): an OUTPUT_DIR of `glm32k dryrun`.

    Returns:
        dict

    Raises:
        InputError: no report in it, or one that does not hold what is compared.
    """
    path = require_file(folder / REPORT, "report of a dry run", "Run `glm32k dryrun` with this --output_dir first.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error}); run the dry run again") from error
    found = isinstance(report, dict) and report.get("programs")
    if not found or "layout_sizes" not in report or not all("work" in program for program in report["programs"]):
        raise InputError(f"{path}: not the report of a dry run of this version; run the dry run again")
    return report


def summarize(name, report):
    """What is compared of one layout.

    Args:
        name (str): heading of its column.
        report (dict): with programs of every stage.

    Returns:
        dict: sizes in bytes, of the fullest card of each stage; "traffic" (bytes of a step by kind) and "flops" are means over
        the layout's cards, of prediction those of the prefill; "estimate" is None for prediction, which nothing is
        calibrated for.

    Raises:
        InputError: a stage has no program in the report.
    """
    stages = stages_of(report)
    fullest = [max(programs, key=lambda program: program["total_bytes"]) for programs in stages]
    memory = [program["total_bytes"] for program in fullest]
    steps = [[program for program in programs if program.get("phase") != "increment"] for programs in stages]
    training = report.get("run_mode", "finetune") in ("train", "finetune")
    return {
        "name": name,
        "config": report["config"],
        "layout": report["layout"],
        "world_size": report["world_size"],
        "tokens_per_step": report["tokens_per_step"],
        "memory_per_stage": memory,
        "memory_worst": max(memory),
        "worst_stage": memory.index(max(memory)),
        "parameters_worst": max(memory) - fullest[memory.index(max(memory))]["activation_peak_bytes"],
        "traffic": _traffic(steps),
        "flops": _mean(steps, lambda program: program["flops"]),
        "flops_recomputed": _mean(
            steps,
            lambda program: sum(
                count for part, count in program["flops_by_part"].items() if part.endswith("recompute")
            ),
        ),
        "estimate": calibration.estimated(report) if training else None,
        "extrapolated": fullest[0].get("extrapolated"),
    }


def _mean(stages, value):
    return round(sum(sum(map(value, programs)) / len(programs) for programs in stages) / len(stages))


def _traffic(stages):
    """Bytes that a card's collectives handle in a step, by kind; groups of one rank apart, for nothing leaves the card."""
    sums = defaultdict(float)
    for programs in stages:
        for program in programs:
            for item in program["collectives"]:
                kind = "Send, Receive" if item["kind"] in ("Send", "Receive") else item["kind"]
                alone = " of one rank" if len(item["group_ranks"]) == 1 else ""
                sums[kind + alone] += item["bytes"] / len(programs) / len(stages)
    return {kind: round(count) for kind, count in sorted(sums.items())}


def table(layouts):
    """Markdown: a row per figure, a column per layout.

    Args:
        layouts (list[dict]): from `summarize`.

    Returns:
        str
    """
    kinds = sorted({kind for layout in layouts for kind in layout["traffic"]})

    def speed(layout, text):
        return text(layout["estimate"]) if layout["estimate"] else "–"

    rows = [
        ("layout", lambda layout: layout["layout"]),
        ("cards", lambda layout: str(layout["world_size"])),
        ("tokens a step", lambda layout: f"{layout['tokens_per_step']:,}"),
        ("figures", lambda layout: _origin(layout["extrapolated"])),
        (
            "memory of each stage, GiB",
            lambda layout: ", ".join(f"{size / GIB:.1f}" for size in layout["memory_per_stage"]),
        ),
        (
            "**fullest card, GiB**",
            lambda layout: f"**{layout['memory_worst'] / GIB:.1f}** (stage {layout['worst_stage']})",
        ),
        ("of it not activations, GiB", lambda layout: f"{layout['parameters_worst'] / GIB:.1f}"),
        ("traffic a card, GB a step", lambda layout: f"{sum(layout['traffic'].values()) / 1e9:.1f}"),
        (
            "traffic a card, MB per 1000 tokens",
            lambda layout: f"{sum(layout['traffic'].values()) / 1e6 / (layout['tokens_per_step'] / 1000):.1f}",
        ),
        *(
            (f"– {kind}, GB a step", lambda layout, kind=kind: f"{layout['traffic'].get(kind, 0) / 1e9:.2f}")
            for kind in kinds
        ),
        ("FLOPs a card, 1e15 a step", lambda layout: f"{layout['flops'] / 1e15:.3f}"),
        ("of it recomputed", lambda layout: f"{100 * layout['flops_recomputed'] / max(layout['flops'], 1):.0f} %"),
        (
            "**estimated tokens/s/p**",
            lambda layout: speed(layout, lambda found: f"**{found['tokens_per_second_per_device']:.0f}**"),
        ),
        ("estimated step, s", lambda layout: speed(layout, lambda found: f"{found['step_seconds']:.2f}")),
        *(
            (f"– {part}, s", lambda layout, part=part: speed(layout, lambda found: f"{found['parts'][part]:.2f}"))
            for part in PARTS
        ),
    ]
    lines = [["", *(layout["name"] for layout in layouts)], ["---"] * (len(layouts) + 1)]
    lines += [[label, *(cell(layout) for layout in layouts)] for label, cell in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _origin(extrapolated):
    if not extrapolated:
        return "compiled in full"
    few, more = extrapolated["from_layers"]
    return f"extrapolated from {few} and {more} layers a stage"


def write(layouts, folder):
    """Writes `compare.md` and `compare.json` and returns the Markdown.

    Args:
        layouts (list[dict]): from `summarize`.
        folder (pathlib.Path): where.

    Returns:
        str
    """
    notes = list(dict.fromkeys(layout["estimate"]["note"] for layout in layouts if layout["estimate"]))
    text = (
        "\n\n".join(
            [
                table(layouts),
                "Memory is of the fullest card of each stage; traffic and FLOPs are means over the cards, FLOPs of attention over all "
                "pairs of positions.",
                *notes,
            ]
        )
        + "\n"
    )
    with atomic_path(folder / "compare.md") as path:
        path.write_text(text, encoding="utf-8")
    with atomic_path(folder / "compare.json") as path:
        path.write_text(json.dumps({"layouts": layouts, "notes": notes}, indent=1), encoding="utf-8")
    return text


def compare(sources, folder, make_report):
    """Compares layouts.

    Args:
        sources (list[str]): YAMLs, or folders of finished reports.
        folder (pathlib.Path): `compare.md` and `compare.json` go there, the report of a YAML to a folder below it.
        make_report (callable): (YAML, output folder) -> report.

    Returns:
        str: Markdown.

    Raises:
        InputError: what is given is neither, or cannot be compared.
    """
    for source in sources:  # before anything is compiled
        if Path(source).is_dir():
            stages_of(read_report(Path(source)))
        else:
            require_file(source, "--compare", "Give YAMLs, or folders of finished dry runs.")
    layouts = []
    for name, source in zip(_names(sources), sources):
        report = read_report(Path(source)) if Path(source).is_dir() else make_report(source, folder / name)
        layouts.append(summarize(name, report))
    return write(layouts, folder)


def _names(sources):
    """The last part of each path, told apart by a number where two are the same."""
    names = []
    for source in sources:
        path = Path(source).resolve()
        stem = path.name if path.is_dir() else path.stem
        same = sum(name == stem or name.startswith(f"{stem}_#") for name in names)
        names.append(f"{stem}_#{same + 1}" if same else stem)
    return names

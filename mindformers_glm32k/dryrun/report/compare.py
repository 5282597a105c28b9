"""Layouts side by side: memory, traffic, work and estimated speed of dry runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from mindformers_glm32k.dryrun.report.advice import GIB
from mindformers_glm32k.dryrun.report.estimate import FIGURES, PARTS, estimate_with_note, stages_of
from mindformers_glm32k.dryrun.report.markdown import table, traffic_by_kind
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file

REPORT = "report.json"


def compare(sources: list[str], folder: Path, make_report: Callable[[str, Path], dict]) -> str:
    """Compares layouts, writes `compare.md` and `compare.json`, and returns the Markdown.

    Args:
        sources: YAMLs, or folders of finished reports.
        folder: the results go there, the report of a YAML to a folder below it.
        make_report: (YAML, output folder) -> report.

    Raises:
        InputError: a source is neither, or cannot be compared.
    """
    for source in sources:  # before anything is compiled
        if Path(source).is_dir():
            stages_of(read_report(Path(source)))
        else:
            require_file(source, "--compare", "Give YAMLs, or folders of finished dry runs.")
    summaries = []
    for name, source in zip(_names(sources), sources):
        report = read_report(Path(source)) if Path(source).is_dir() else make_report(source, folder / name)
        summaries.append(summarize(name, report))
    return _write(summaries, folder)


def read_report(folder: Path) -> dict:
    """A finished report, of an OUTPUT_DIR of `glm32k dryrun`.

    Raises:
        InputError: no report in it, or one of another version.
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


def summarize(name: str, report: dict) -> dict:
    """The figures of one layout, called `name`, for the comparison; the report must have programs of every stage.

    Returns:
        Sizes in bytes, of the fullest card of each stage; "traffic" (bytes of a step by kind) and "flops" are means
        over the layout's cards, for prediction of the prefill only; "estimate" is None for prediction, for which no
        calibration exists.

    Raises:
        InputError: a stage has no program in the report.
    """
    stages = stages_of(report)
    fullest = [max(programs, key=lambda program: program["total_bytes"]) for programs in stages]
    memory = [program["total_bytes"] for program in fullest]
    worst = memory.index(max(memory))
    steps = [[program for program in programs if program.get("phase") != "increment"] for programs in stages]
    training = report.get("run_mode", "finetune") in ("train", "finetune")
    return {
        "name": name,
        "config": report["config"],
        "layout": report["layout"],
        "world_size": report["world_size"],
        "tokens_per_step": report["tokens_per_step"],
        "memory_per_stage": memory,
        "memory_worst": memory[worst],
        "worst_stage": worst,
        "parameters_worst": memory[worst] - fullest[worst]["activation_peak_bytes"],
        "traffic": _traffic(steps),
        "flops": _mean(steps, lambda program: program["flops"]),
        "flops_recomputed": _mean(steps, _recomputed),
        "estimate": estimate_with_note(report) if training else None,
        "extrapolated": fullest[0].get("extrapolated"),
    }


def _recomputed(program):
    return sum(count for part, count in program["flops_by_part"].items() if part.endswith("recompute"))


def _mean(stages, value):
    return round(sum(sum(map(value, programs)) / len(programs) for programs in stages) / len(stages))


def _traffic(stages):
    """Bytes that a card's collectives handle in a step, by kind."""
    sums = defaultdict(float)
    for programs in stages:
        for program in programs:
            for kind, size in traffic_by_kind(program).items():
                sums[kind] += size / len(programs) / len(stages)
    return {kind: round(count) for kind, count in sorted(sums.items())}


def _figures(summaries):
    """(label, function from a summary to the text of its cell) for each line of the table."""
    kinds = sorted({kind for summary in summaries for kind in summary["traffic"]})

    def speed(text):
        return lambda it: text(it["estimate"]) if it["estimate"] else "–"

    def moved(it):
        return sum(it["traffic"].values())

    yield "layout", lambda it: it["layout"]
    yield "cards", lambda it: str(it["world_size"])
    yield "tokens a step", lambda it: f"{it['tokens_per_step']:,}"
    yield "figures", lambda it: _origin(it["extrapolated"])
    yield "memory of each stage, GiB", lambda it: ", ".join(f"{size / GIB:.1f}" for size in it["memory_per_stage"])
    yield "**fullest card, GiB**", lambda it: f"**{it['memory_worst'] / GIB:.1f}** (stage {it['worst_stage']})"
    yield "of it not activations, GiB", lambda it: f"{it['parameters_worst'] / GIB:.1f}"
    yield "traffic a card, GB a step", lambda it: f"{moved(it) / 1e9:.1f}"
    yield "traffic a card, MB per 1000 tokens", lambda it: f"{moved(it) / 1e6 / (it['tokens_per_step'] / 1000):.1f}"
    for kind in kinds:
        yield f"– {kind}, GB a step", lambda it, kind=kind: f"{it['traffic'].get(kind, 0) / 1e9:.2f}"
    yield "FLOPs a card, 1e15 a step", lambda it: f"{it['flops'] / 1e15:.3f}"
    yield "of it recomputed", lambda it: f"{100 * it['flops_recomputed'] / max(it['flops'], 1):.0f} %"
    yield "**estimated tokens/s/p**", speed(lambda found: f"**{found['tokens_per_second_per_device']:.0f}**")
    yield f"fitted to {FIGURES} figures, tokens/s/p", speed(lambda found: _interval(found["fitted"]))
    yield "estimated step, s", speed(lambda found: f"{found['step_seconds']:.2f}")
    for part in PARTS:
        yield f"– {part}, s", speed(lambda found, part=part: f"{found['parts'][part]:.2f}")


def _interval(fitted):
    low, high = fitted["interval"]
    return f"{fitted['tokens_per_second_per_device']:.0f} ({low:.0f} to {high:.0f})"


def _origin(extrapolated):
    if not extrapolated:
        return "compiled in full"
    few, more = extrapolated["from_layers"]
    return f"extrapolated from {few} and {more} layers a stage"


def _write(summaries, folder):
    notes = list(dict.fromkeys(summary["estimate"]["note"] for summary in summaries if summary["estimate"]))
    lines = [[label, *map(cell, summaries)] for label, cell in _figures(summaries)]
    head = ["", *(summary["name"] for summary in summaries)]
    how = "Memory is of the fullest card of each stage; traffic and FLOPs are means over the cards, FLOPs of attention "
    how += "over all pairs of positions."
    text = "\n\n".join([table(head, lines, texts=len(head)), how, *notes]) + "\n"
    with atomic_path(folder / "compare.md") as path:
        path.write_text(text, encoding="utf-8")
    with atomic_path(folder / "compare.json") as path:
        path.write_text(json.dumps({"layouts": summaries, "notes": notes}, indent=1), encoding="utf-8")
    return text


def _names(sources):
    """The last part of each path, told apart by a running index where two are the same."""
    names = []
    for source in sources:
        path = Path(source).resolve()
        stem = path.name if path.is_dir() else path.stem
        same = sum(name == stem or name.startswith(f"{stem}_#") for name in names)
        names.append(f"{stem}_#{same + 1}" if same else stem)
    return names

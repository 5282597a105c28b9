"""The report of a dry run: report.json with all figures, report.md and report.png for people."""

from __future__ import annotations

import json
from pathlib import Path

from mindformers_glm32k.dryrun.report.advice import device_memory, warnings_of
from mindformers_glm32k.dryrun.report.estimate import estimate_with_note
from mindformers_glm32k.dryrun.report.markdown import PLOT, draw, render
from mindformers_glm32k.files import atomic_path

__all__ = ["write_report"]


def write_report(report: dict, config: dict, folder: Path) -> None:
    """Adds estimate and warnings to the report, and writes report.json, report.md and report.png.

    Args:
        report: layout and programs; changed in place: "max_device_memory_bytes" (None where the YAML sets none),
            "estimate" (None for prediction or when a stage has no program) and "warnings" are added.
        config: the merged configuration.
        folder: where the files go.
    """
    report["max_device_memory_bytes"] = device_memory(config)
    stages = {program["stage"] for program in report["programs"]}
    complete = report["run_mode"] in ("train", "finetune") and len(stages) == report["layout_sizes"]["stages"]
    report["estimate"] = estimate_with_note(report) if complete else None
    report["warnings"] = warnings_of(report, config)
    for name, text in (("report.json", json.dumps(report, indent=1)), ("report.md", render(report))):
        with atomic_path(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    draw(report, folder / PLOT)

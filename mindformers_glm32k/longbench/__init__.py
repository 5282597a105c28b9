"""LongBench: prompts as its own programs build them, predictions, scores, reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_glm32k.lazy import face

if TYPE_CHECKING:
    from mindformers_glm32k.longbench.score import RunScores

_FACE = {
    "WITHOUT_CHAT_FORMAT": "samples",
    "build_prompt_ids": "samples",
    "find": "files",
    "score_folder": "score",
    "score_rows": "score",
}
__all__ = sorted([*_FACE, "write_report"])
__getattr__ = face(__name__, _FACE)


def write_report(runs: dict[str, RunScores], folder: Path) -> tuple[Path, Path]:
    """Writes report.html and report.md, and returns their paths.

    Args:
        runs: by name; the report is on the first, the others are shown for comparison.
        folder: the folder to write to, created if missing.
    """
    from mindformers_glm32k.files import atomic_path
    from mindformers_glm32k.longbench import html, markdown, report

    content = report.build(runs)
    paths = folder / "report.html", folder / "report.md"
    for path, render in zip(paths, (html.render, markdown.render)):
        with atomic_path(path) as temporary:
            temporary.write_text(render(content), encoding="utf-8")
    return paths

"""Scores as a plain table for the terminal."""

from __future__ import annotations

from mindformers_glm32k.longbench import summary
from mindformers_glm32k.longbench.score import BUCKETS, RunScores

HEAD = ("data set", "score", "95 % interval", "rows", *BUCKETS, "empty", "loops", "trained on")


def text(run: RunScores) -> str:
    """One line a data set, and below them the leaderboard's means."""
    lines: list[tuple[str, ...]] = [HEAD]
    for names in summary.kinds(run).values():
        for name in names:
            found = run.datasets[name].summary()
            lines.append(
                (
                    name,
                    f"{found['score']:.2f}",
                    "{:.1f} to {:.1f}".format(*found["interval"]),
                    rows_text(found),
                    *(number(found["score_e"][part]) for part in BUCKETS),
                    *(str(found[key] or "-") for key in ("empty", "loops", "trained_on")),
                )
            )
        for wanted in summary.means(names):
            mean = summary.mean(run, wanted.groups)
            lines.append(
                (wanted.title, f"{mean.score:.2f}", "{:.1f} to {:.1f}".format(*mean.interval), str(mean.rows))
                + ("",) * (len(HEAD) - 4)
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def rows_text(found: dict) -> str:
    """The number of rows, with `of` how many where some are missing; `?` where that is not known."""
    if found["complete"]:
        return str(found["rows"])
    return f"{found['rows']} of {'?' if found['expected'] is None else found['expected']}"


def number(value: float | None) -> str:
    """A score, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"

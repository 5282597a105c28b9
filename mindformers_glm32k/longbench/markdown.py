"""A report as Markdown."""

from __future__ import annotations

from mindformers_glm32k.longbench.report import Answers, HeatMap, Report, Table, Track

_TEXT = 300  # characters shown of a text


def render(report: Report) -> str:
    """The whole text."""
    lines = [f"# {_escape(report.title)}", "", *(f"{_escape(line)}\n" for line in report.lead)]
    lines += [f"> **{_escape(line)}**\n>" for line in report.warnings] + [""]
    for section in report.sections:
        lines += [f"## {_escape(section.title)}", "", *(f"{note}\n" for note in section.notes)]
        for block in section.blocks:
            lines += [_BLOCKS[type(block)](block), ""]
    return "\n".join(lines)


def _table(table: Table) -> str:
    texts = [index for index in range(len(table.head)) if not any(isinstance(row[index], Track) for row in table.rows)]
    return _rows(
        [table.head[index] for index in texts],
        [
            [f"**{_escape(row[index])}**" if place in table.strong else _escape(row[index]) for index in texts]
            for place, row in enumerate(table.rows)
        ],
    )


def _rows(head, rows):
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _map(block: HeatMap) -> str:
    return _rows(
        ["depth", *block.columns],
        [
            [depth, *("" if cell is None else f"{cell.score:.0f} ({cell.rows})" for cell in cells)]
            for depth, cells in block.rows
        ],
    )


def _answers(block: Answers) -> str:
    lines = [f"### {_escape(block.dataset)}", ""]
    if not block.worst:
        return "\n".join([*lines, "Every answer has the full score."])
    for number, answer in enumerate(block.worst, 1):
        marks = "".join(f", {mark}" for mark in answer.marks)
        lines.append(f"{number}. score {answer.score:g}, length {answer.length}{marks}")
        texts = [("question", answer.question)] if answer.question else []
        texts += [("answer", " / ".join(answer.answers)), ("prediction", answer.prediction), *answer.others]
        lines += [f"    - {name}: {_line(text)}" for name, text in texts]
    return "\n".join(lines)


_BLOCKS = {Table: _table, HeatMap: _map, Answers: _answers}


def _line(text):
    text = " ".join(text.split())
    text = text if len(text) <= _TEXT else f"{text[: _TEXT // 2]} … {text[-_TEXT // 2 :]}"
    return _escape(text) if text else "*(empty)*"


def _escape(text):
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, "\\" + sign)
    return text

"""A report as one HTML page that needs nothing else: no script, no file, no network."""

from __future__ import annotations

from html import escape
from pathlib import Path

from mindformers_glm32k.longbench.report import Answers, HeatMap, Report, Table, Track

_COLOURS = ("#1f5fbf", "#d9730d", "#3a8f4d", "#8e44ad", "#b0306a", "#5d6d7e")


_SCALE = '<span class="scale"><i>0</i><i>50</i><i>100</i></span>'


def render(report: Report) -> str:
    """The whole page."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    style += "".join(f".run{index} {{ --run: {_colour(index)}; }}\n" for index in range(len(report.runs)))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.title)}</title><style>\n{style}</style></head><body><main>",
        f"<h1>{escape(report.title)}</h1>",
        *(f'<p class="lead">{escape(line)}</p>' for line in report.lead),
        _warnings(report.warnings),
        _legend(report),
    ]
    for section in report.sections:
        parts += [f"<section><h2>{escape(section.title)}</h2>", *(f"<p>{escape(note)}</p>" for note in section.notes)]
        parts += [_BLOCKS[type(block)](block) for block in section.blocks]
        parts.append("</section>")
    return "\n".join(part for part in [*parts, "</main></body></html>"] if part) + "\n"


def _colour(index):
    return _COLOURS[index % len(_COLOURS)]


def _warnings(lines):
    return f'<ul class="warnings">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _legend(report):
    entries = [
        f'<span class="run{index}"><i class="dot"></i>{escape(name)}</span>' for index, name in enumerate(report.runs)
    ]
    if any(mark[1] is None for mark in _marks(report)):
        entries.append('<span><i class="published"></i>published</span>')
    return f'<div class="legend">{"".join(entries)}</div>'


def _marks(report):
    for section in report.sections:
        for block in section.blocks:
            if isinstance(block, Table):
                yield from (
                    mark for row in block.rows for cell in row if isinstance(cell, Track) for mark in cell.marks
                )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(text) or _SCALE}</th>" for text in table.head)
    rows = "".join(
        f"<tr{' class=strong' if index in table.strong else ''}>{''.join(map(_cell, row))}</tr>"
        for index, row in enumerate(table.rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(cell):
    if not isinstance(cell, Track):
        return f"<td{' class=beyond' if cell.endswith(' *') else ''}>{escape(cell)}</td>"
    runs = [mark for mark in cell.marks if mark[1] is not None]
    bars = [
        f'<span class="lane run{index}" title="{escape(name)}: {figure.score:.2f}">'
        f'<i class="bar" style="left:{_percent(figure.interval[0])};'
        f'width:{_percent(figure.interval[1] - figure.interval[0])}"></i>'
        f'<i class="dot" style="left:{_percent(figure.score)}"></i></span>'
        for name, index, figure in runs
    ]
    bars += [
        f'<i class="published" style="left:{_percent(figure.score)}" title="published: {figure.score:.2f}"></i>'
        for _, index, figure in cell.marks
        if index is None
    ]
    return f'<td class="track"><div>{"".join(bars)}</div></td>'


def _percent(value):
    return f"{min(max(value, 0.0), 100.0):.1f}%"


def _map(block: HeatMap) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in ("depth", *block.columns))
    rows = "".join(f"<tr><td>{escape(depth)}</td>{''.join(map(_map_cell, cells))}</tr>" for depth, cells in block.rows)
    return f'<div class="wide"><table class="map"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _map_cell(cell):
    if cell is None:
        return '<td class="none">-</td>'
    hue = 120 * cell.score / 100  # red to green, with the number for those who cannot tell them apart
    return f'<td style="background:hsl({hue:.0f} 55% 72%)">{cell.score:.0f}<small>{cell.rows}</small></td>'


def _answers(block: Answers) -> str:
    if not block.worst:
        return f"<details><summary>{escape(block.dataset)}: every answer has the full score</summary></details>"
    items = "".join(map(_answer, block.worst))
    return f"<details><summary>{escape(block.dataset)}: {len(block.worst)}</summary><ol>{items}</ol></details>"


def _answer(answer):
    marks = "".join(f" <b>{escape(mark)}</b>" for mark in answer.marks)
    texts = [("question", answer.question)] if answer.question else []
    texts += [("answer", text) for text in answer.answers]
    texts += [("prediction", answer.prediction), *answer.others]
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text.strip()) or '<em>empty</em>'}</dd>" for name, text in texts
    )
    return f"<li><p>score {answer.score:g}, length {answer.length}{marks}</p><dl>{lines}</dl></li>"


_BLOCKS = {Table: _table, HeatMap: _map, Answers: _answers}

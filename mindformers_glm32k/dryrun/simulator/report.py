"""execution.json and execution.md: what was executed, and whether it agrees with one device."""

import json

from mindformers_glm32k.files import atomic_path

SHOWN = 8


def write_reports(report, folder, text=None):
    """Writes both files.

    Args:
        report (dict): execution.json.
        folder (pathlib.Path): where they go.
        text (str | None): execution.md; by default that of a training run.
    """
    for name, content in (("execution.json", json.dumps(report, indent=1)), ("execution.md", text or render(report))):
        with atomic_path(folder / name) as path:
            path.write_text(content, encoding="utf-8")


def verdict(report):
    """list[str]: what differs, for the terminal, and whether all agree."""
    lines = [f"DIFFERS: {problem}" for problem in report["problems"][:SHOWN]]
    if len(report["problems"]) > SHOWN:
        lines.append(f"... and {len(report['problems']) - SHOWN} more, see execution.json")
    return lines + ["all agree" if report["agrees"] else f"{len(report['problems'])} disagreements"]


def disagreements(report):
    """list[str]: the section of execution.md that lists all that differs; empty when nothing does."""
    if not report["problems"]:
        return []
    return ["", "## Disagreements", "", *[f"- {problem}" for problem in report["problems"]]]


def table(report):
    """str: the steps, beside one device's, for the terminal; then the verdict."""
    lines = [
        f"{report['layout']} on {report['world_size']} NPUs, {report['precision']}, beside one device on the same "
        f"{report['rows_per_step']} rows a step",
        f"{'step':>4} {'loss':>14} {'one device':>14} {'gradient norm':>14} {'one device':>14} {'learning rate':>13} "
        f"{'loss scale':>10} overflow",
    ]
    for number, step in enumerate(report["steps"], 1):
        lines.append(
            f"{number:>4} {step['loss']:>14.8g} {step['loss_one_device']:>14.8g} {_text(step['grad_norm']):>14} "
            f"{_text(step['grad_norm_one_device']):>14} {step['learning_rate']:>13.6g} "
            f"{step['loss_scale']:>10g} {step['overflow']}"
        )
    lines.append(
        f"weights differ by {report['largest_weight_difference']:.3g} at most "
        f"({report['largest_weight_difference_relative']:.2g} of the parameter's largest element), "
        f"moments by {report['largest_moment_difference_relative']:.2g} of theirs"
    )
    for event in report["non_finite"][:SHOWN]:
        lines.append(
            f"first value that is not finite in step {event['step']}: rank {event['rank']}, {event['place']} -> "
            f"{event['output']}"
        )
    return "\n".join(lines + verdict(report))


def _text(value):
    return "-" if value is None else f"{value:.8g}"


def introduction(report, what, precision, inputs, shown):
    """What every execution.md begins with.

    Args:
        report (dict): execution.json.
        what (str): was executed beside what.
        precision (str), inputs (str): a sentence each.
        shown (str): the table.

    Returns:
        list[str]: lines.
    """
    shrunk = "; ".join(f"{key} {old} -> {new}" for key, (old, new) in report["shrunk"].items())
    return [
        f"# Rehearsal of {report['config']}",
        "",
        f"{report['layout']}: {what} {'**All agree.**' if report['agrees'] else '**They differ.**'}",
        "",
        f"- Precision: {precision}.",
        f"- Shrunk: {shrunk or 'nothing'}.",
        f"- {inputs} Weights: {report['weights']}.",
        f"- Compiled in {report['compile_seconds']} s, executed in {report['execution_seconds']} s "
        f"(one device {report['execution_seconds_one_device']} s).",
        "- It shows that the layout computes what one device computes. It does not show the kernels of an NPU, their "
        "speed, or HCCL.",
        "",
        "```",
        shown,
        "```",
    ]


def render(report):
    """str: execution.md."""
    what = (
        f"the programs of {report['world_size']} NPUs, compiled for Ascend and executed in NumPy, beside the program "
        "of one device on the same rows."
    )
    lines = [
        *introduction(
            report,
            what,
            report["precision"],
            f"Rows: {report['rows_per_step']} a step, {report['rows']}.",
            table(report),
        ),
        "",
        "## Largest differences of parameters",
        "",
        "| parameter | largest difference | of its largest element | elements left out as noise |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {item['name']} | {item['largest']:.3g} | {item['relative']:.3g} | {item['noise']} |"
        for item in report["largest_differences"]
    ]
    lines += disagreements(report)
    lines += ["", "## Collectives executed, by rank", "", "| collective | rank | calls |", "| --- | ---: | ---: |"]
    lines += [f"| {item['kind']} | {item['rank']} | {item['count']} |" for item in report["collectives"]]
    return "\n".join(lines) + "\n"

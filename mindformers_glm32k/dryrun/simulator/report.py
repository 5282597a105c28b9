"""execution.json and execution.md: what was simulated, and whether it agrees with one device."""

from __future__ import annotations

import json
from pathlib import Path

from mindformers_glm32k.files import atomic_path

SHOWN = 8


def write_reports(report: dict, folder: Path) -> None:
    """Writes execution.json (`report`) and execution.md."""
    for name, content in (("execution.json", json.dumps(report, indent=1)), ("execution.md", render(report))):
        with atomic_path(folder / name) as path:
            path.write_text(content, encoding="utf-8")


def summary(report: dict) -> str:
    """The steps or tokens beside one device's, for the terminal; then the verdict."""
    lines = _tokens(report) if _of_prediction(report) else _steps(report)
    lines += [f"DIFFERS: {problem}" for problem in report["problems"][:SHOWN]]
    if len(report["problems"]) > SHOWN:
        lines.append(f"... and {len(report['problems']) - SHOWN} more, see execution.json")
    return "\n".join([*lines, "all agree" if report["agrees"] else f"{len(report['problems'])} disagreements"])


def render(report: dict) -> str:
    """execution.md."""
    lines = _prediction(report) if _of_prediction(report) else _training(report)
    return "\n".join(lines) + "\n"


def _of_prediction(report):
    return "tokens" in report


def _steps(report):
    lines = [
        f"{report['layout']} on {report['world_size']} NPUs, {report['precision']}, beside one device on the same "
        f"{report['rows_per_step']} sequences a step",
        f"{'step':>4} {'loss':>14} {'one device':>14} {'gradient norm':>14} {'one device':>14} {'learning rate':>13} "
        f"{'loss scale':>10} overflow",
    ]
    for index, step in enumerate(report["steps"], 1):
        lines.append(
            f"{index:>4} {step['loss']:>14.8g} {step['loss_one_device']:>14.8g} {_text(step['grad_norm']):>14} "
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
    return lines


def _text(value):
    return "-" if value is None else f"{value:.8g}"


def _tokens(report):
    lines = [
        f"{report['layout']} on {report['world_size']} NPUs, {report['precision']}, beside one device on the same "
        f"{len(report['tokens'])} prompts of {', '.join(map(str, report['prompt_lengths']))} tokens",
        f"{'token':>5} {'largest difference of logits':>28} {'margin':>10} tokens",
    ]
    for index, step in enumerate(report["steps"], 1):
        text = " ".join(
            f"{ours}" if ours == theirs else f"{ours} (one device {theirs})"
            for ours, theirs in zip(step["tokens"], step["tokens_one_device"])
        )
        lines.append(f"{index:>5} {step['logit_difference']:>28.3g} {step['smallest_margin']:>10.3g} {text}")
    lines.append(
        f"logits differ by {report['largest_logit_difference']:.3g} at most "
        f"({report['largest_logit_difference_relative']:.2g} of the largest, {report['largest_logit']:.4g})"
    )
    for event in report["non_finite"][:SHOWN]:
        lines.append(f"a value that is not finite, rank {event['rank']}: {event['place']} -> {event['output']}")
    return lines + [f"near tie: {text}" for text in report["near_ties"][:SHOWN]]


def _introduction(report, what, precision, inputs):
    """The first section of execution.md; `what` and `inputs` are sentences, `precision` is a dtype or a phrase."""
    scaled = "; ".join(f"{key} {old} -> {new}" for key, (old, new) in report["shrunk"].items())
    return [
        f"# Simulation of {report['config']}",
        "",
        f"{report['layout']}: {what} {'**All agree.**' if report['agrees'] else '**They differ.**'}",
        "",
        f"- Precision: {precision}.",
        f"- Scaled down: {scaled or 'nothing'}.",
        f"- {inputs} Weights: {report['weights']}.",
        f"- Compiled in {report['compile_seconds']} s, simulated in {report['execution_seconds']} s "
        f"(one device {report['execution_seconds_one_device']} s).",
        "- It shows that the layout computes what one device computes. It does not show the kernels of an NPU, their "
        "speed, or HCCL.",
        "",
        "```",
        summary(report),
        "```",
    ]


def _problems(report):
    """The section that lists all that differs; empty when nothing does."""
    if not report["problems"]:
        return []
    return ["", "## Disagreements", "", *[f"- {problem}" for problem in report["problems"]]]


def _training(report):
    what = (
        f"the programs of {report['world_size']} NPUs, compiled for Ascend and run in NumPy, beside the program "
        "of one device on the same sequences."
    )
    inputs = f"Sequences: {report['rows_per_step']} a step, {report['rows']}."
    lines = [
        *_introduction(report, what, report["precision"], inputs),
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
    lines += _problems(report)
    lines += ["", "## Collectives, by rank", "", "| collective | rank | calls |", "| --- | ---: | ---: |"]
    return lines + [f"| {item['kind']} | {item['rank']} | {item['count']} |" for item in report["collectives"]]


def _prediction(report):
    what = (
        f"greedy decoding by the programs of {report['world_size']} NPUs (prefill, increment), compiled for Ascend and "
        "run in NumPy, beside the programs of one device on the same prompts."
    )
    lines = _introduction(report, what, report["precision_text"], f"Prompts: {report['prompts_text']}.")
    lines += _problems(report)
    lines += [
        "",
        "## Collectives, by rank",
        "",
        "| collective | rank | program | calls |",
        "| --- | ---: | --- | ---: |",
    ]
    return lines + [
        f"| {item['kind']} | {item['rank']} | {item['phase']} | {item['count']} |" for item in report["collectives"]
    ]

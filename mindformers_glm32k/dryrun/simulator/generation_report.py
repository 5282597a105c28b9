"""execution.json and execution.md of prediction: what was generated, and whether it agrees with one device."""

from mindformers_glm32k.dryrun.simulator import report as reports


def write_reports(report, folder):
    """Writes both files, see `report.write_reports`."""
    reports.write_reports(report, folder, render(report))


def table(report):
    """str: the tokens, beside one device's, for the terminal; then the verdict."""
    rows = len(report["tokens"])
    lines = [
        f"{report['layout']} on {report['world_size']} NPUs, {report['precision']}, beside one device on the same "
        f"{rows} prompts of {', '.join(map(str, report['prompt_lengths']))} tokens",
        f"{'token':>5} {'largest difference of logits':>28} {'margin':>10} tokens",
    ]
    for number, step in enumerate(report["steps"], 1):
        text = " ".join(
            f"{ours}" if ours == theirs else f"{ours} (one device {theirs})"
            for ours, theirs in zip(step["tokens"], step["tokens_one_device"])
        )
        lines.append(f"{number:>5} {step['logit_difference']:>28.3g} {step['smallest_margin']:>10.3g} {text}")
    lines.append(
        f"logits differ by {report['largest_logit_difference']:.3g} at most "
        f"({report['largest_logit_difference_relative']:.2g} of the largest, {report['largest_logit']:.4g})"
    )
    for event in report["non_finite"][: reports.SHOWN]:
        lines.append(f"a value that is not finite, rank {event['rank']}: {event['place']} -> {event['output']}")
    lines += [f"near tie: {text}" for text in report["near_ties"][: reports.SHOWN]]
    return "\n".join(lines + reports.verdict(report))


def render(report):
    """str: execution.md."""
    what = (
        f"greedy decoding by the programs of {report['world_size']} NPUs (prefill, increment), compiled for Ascend and "
        "executed in NumPy, beside the programs of one device on the same prompts."
    )
    lines = reports.introduction(
        report, what, report["precision_text"], f"Prompts: {report['prompts_text']}.", table(report)
    )
    lines += reports.disagreements(report)
    lines += [
        "",
        "## Collectives executed, by rank",
        "",
        "| collective | rank | program | calls |",
        "| --- | ---: | --- | ---: |",
    ]
    lines += [
        f"| {item['kind']} | {item['rank']} | {item['phase']} | {item['count']} |" for item in report["collectives"]
    ]
    return "\n".join(lines) + "\n"

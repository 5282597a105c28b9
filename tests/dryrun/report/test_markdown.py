"""report.md and report.png say what report.json holds."""

from pathlib import Path

from matplotlib import pyplot

from mindformers_glm32k.dryrun.report.estimate import FIGURES
from mindformers_glm32k.dryrun.report.markdown import (
    MEMORY,
    ORDER_NAMES,
    memory_parts,
    render,
    table,
    three_digits,
    title,
)


def test_memory_adds_up(report):
    for program in report["programs"]:
        parts = memory_parts(program)
        assert list(parts) == [name for _, name in MEMORY]
        assert sum(parts.values()) == program["total_bytes"]


def test_an_engineer_finds_what_he_asks_for(report, pipeline):
    text = (pipeline / "report.md").read_text()
    assert text == render(report)
    assert "dp 2 x pp 2, 4 micro batches on 4 NPUs" in text and "sequences of 64 tokens, 2 layers" in text
    assert "A step reads 512 tokens" in text
    assert "take the place of files that are not there: dataset_dir ''" in text
    worst = max(report["programs"], key=lambda program: program["total_bytes"])
    assert f"({title(worst)})" in text
    assert "Estimates, not a measurement: **" in text and "tokens/s/p" in text
    assert f"by the fit to {FIGURES} figures" in text
    assert "| Send | forward | 0, 2 |" in text
    assert "max_device_memory" in text
    for program in report["programs"]:
        assert f"{program['parameter_count']:,}" in text
        assert program["peak_at"] in text


def test_memory_by_execution_order(report):
    gib = 1024**3
    for program in report["programs"]:
        totals = program["total_bytes_by_order"]
        assert totals["file"] == program["total_bytes"]
        assert totals["best"] <= min(totals.values()) and list(totals) == list(ORDER_NAMES)
    orders = {"file": 74 * gib, "bfs": 75 * gib, "dfs": 60 * gib, "best": 52 * gib}
    text = render({**report, "programs": [{**report["programs"][0], "total_bytes_by_order": orders}]})
    assert "file's order, GiB | bfs, GiB | dfs, GiB | best known order, GiB" in text
    assert "| 74.0 | 75.0 | 60.0 | 52.0 |" in text
    without = {name: value for name, value in report["programs"][0].items() if name != "total_bytes_by_order"}
    assert "execution order" not in render({**report, "programs": [without]})  # reports of older versions


def test_warnings_are_in_the_report(report):
    text = render({**report, "warnings": [{"kind": "wide", "what": "the card is pink", "fix": "Paint it."}]})
    assert "- **the card is pink.** Paint it." in text
    assert "None." in render({**report, "warnings": []})


def test_one_npu_and_no_estimate(report):
    text = render({**report, "world_size": 1, "estimate": None, "max_device_memory_bytes": None})
    assert "One NPU, run mode finetune" in text
    assert "tokens/s/p" not in text and "max_device_memory" not in text


def test_the_plot_is_there(pipeline):
    image = pyplot.imread(Path(pipeline) / "report.png")
    assert image.shape[0] > 200 and image.shape[1] > 1000
    assert len({tuple(color) for row in image[::7] for color in row[::7]}) > 6  # bars of several colours


def test_numbers_keep_three_digits():
    assert [three_digits(value) for value in (0, 0.004123, 1, 33.54, 50, 14443.4)] == [
        "0",
        "0.00412",
        "1.00",
        "33.5",
        "50.0",
        "14443",
    ]


def test_tables_have_words_on_the_left_and_numbers_on_the_right():
    assert table(["a", "b", "c"], [["x", "y", 1]], texts=2) == "| a | b | c |\n| --- | --- | ---: |\n| x | y | 1 |"

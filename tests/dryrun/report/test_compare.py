"""Layouts side by side: from finished reports, from a YAML, and what is refused."""

import copy
import json

import pytest

from dryrun.tiny import run_dryrun
from mindformers_glm32k.dryrun.report import compare
from mindformers_glm32k.errors import InputError


def no_compile(config, folder):
    raise AssertionError(f"{config} was compiled")


@pytest.fixture
def leaner(report, tmp_path):
    """The pipeline's report with half of its traffic and a fuller first stage."""
    changed = copy.deepcopy(report)
    for program in changed["programs"]:
        for item in program["collectives"]:
            item["bytes"] //= 2
    changed["programs"][0]["total_bytes"] = 4 * compare.GIB
    folder = tmp_path / "leaner"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(changed))
    return folder


def test_two_reports(pipeline, report, leaner, tmp_path):
    text = compare.compare([str(pipeline), str(leaner)], tmp_path / "out", no_compile)
    assert text == (tmp_path / "out" / "compare.md").read_text()
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    first, second = found["layouts"]
    assert first["memory_per_stage"] == [program["total_bytes"] for program in report["programs"]]
    assert (second["memory_worst"], second["worst_stage"]) == (4 * compare.GIB, 0)
    assert sum(second["traffic"].values()) == pytest.approx(sum(first["traffic"].values()) / 2, rel=0.01)
    assert first["tokens_per_step"] == 2 * 4 * 64
    assert first["flops"] == sum(program["flops"] for program in report["programs"]) / 2
    assert second["estimate"]["step_seconds"] < first["estimate"]["step_seconds"]
    rows = {
        cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in text.splitlines()) if len(cells) > 3
    }
    assert rows["**fullest card, GiB**"][1].strip() == "**4.0** (stage 0)"
    assert rows["layout"][0].strip() == "dp 2 x pp 2, 4 micro batches"


def test_an_estimate_says_that_it_is_one(pipeline, tmp_path):
    text = compare.compare([str(pipeline)], tmp_path, no_compile)
    assert "estimated tokens/s/p" in text
    assert "not a measurement" in text and "1758" in text and "2501" in text


def test_prediction_gets_no_estimate(report):
    assert compare.summarize("p", {**report, "run_mode": "predict"})["estimate"] is None


def test_same_names_are_told_apart(pipeline, tmp_path):
    compare.compare([str(pipeline), str(pipeline)], tmp_path, no_compile)
    names = [layout["name"] for layout in json.loads((tmp_path / "compare.json").read_text())["layouts"]]
    assert len(set(names)) == 2


def test_what_cannot_be_compared_is_refused_before_anything_is_compiled(pipeline, report, tmp_path):
    empty, old, half = (tmp_path / name for name in ("empty", "old", "half"))
    for folder in (empty, old, half):
        folder.mkdir()
    (old / "report.json").write_text(json.dumps({"world_size": 4, "programs": [{"rank": 0}]}))
    (half / "report.json").write_text(json.dumps({**report, "programs": report["programs"][:1]}))
    for source, told in (
        (empty, "no such file"),
        (old, "run the dry run again"),
        (half, "stage 1"),
        (tmp_path / "nothing.yaml", "nothing.yaml"),
    ):
        with pytest.raises(InputError, match=told):
            compare.compare([__file__, str(source)], tmp_path / "out", no_compile)
    assert not (tmp_path / "out").exists()


def test_quick_from_a_yaml_equals_the_full_depth(tmp_path):
    """One device, six layers: compiled, and extrapolated by `--compare`."""
    overrides = {"use_parallel": False, "model__model_config__num_layers": 6}
    full = run_dryrun(tmp_path / "full", **overrides)
    assert full.returncode == 0, full.stderr
    from dryrun.tiny import CONFIG

    quick = run_dryrun(
        tmp_path / "out", "--compare", str(tmp_path / "full"), str(CONFIG), "--quick", config=None, **overrides
    )
    assert quick.returncode == 0, quick.stderr
    assert "extrapolated from 2 and 4 layers a stage" in quick.stdout
    exact, guess = json.loads((tmp_path / "out" / "compare.json").read_text())["layouts"]
    assert guess["flops"] == exact["flops"]
    assert guess["memory_worst"] == pytest.approx(exact["memory_worst"], rel=0.003)
    assert guess["estimate"]["step_seconds"] == pytest.approx(exact["estimate"]["step_seconds"], rel=0.003)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.json",
        "compare.md",
        "finetune_glm32k",
    ]

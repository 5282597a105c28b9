"""`glm32k longbench`: options and what is printed."""

import json

import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.data.longbench import Manifest
from tests.longbench.test_report import make_run
from tests.longbench.test_score import prediction, write


def test_score_prints_a_table_and_writes_scores(tmp_path, capsys):
    make_run(tmp_path / "a", 0.5)
    assert cli.main(["longbench", "score", "--predictions", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr()
    scores = json.loads((tmp_path / "a" / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"hotpotqa", "multifieldqa_zh", "passage_retrieval_en"}
    for name, entry in scores.items():
        line = next(line for line in printed.out.splitlines() if line.startswith(name))
        assert f"{entry['score']:.2f}" in line
    assert "all, English (2 of 16)" in printed.out and "--data tells" in printed.err


def test_data_tells_what_is_missing(tmp_path, capsys):
    write(tmp_path / "pred", "hotpotqa", [prediction(_id="1")])
    record = {"dataset": "hotpotqa", "context": "c", "input": "i", "answers": ["a"], "length": 1}
    write(tmp_path / "data", "hotpotqa", [{**record, "_id": "1"}, {**record, "_id": "2"}])
    write(tmp_path / "data", "trec_e", [{**record, "dataset": "trec", "_id": "1"}])
    command = ["longbench", "score", "--predictions", str(tmp_path / "pred"), "--data", str(tmp_path / "data")]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["trec_e: NO PREDICTIONS", "hotpotqa: INCOMPLETE, 1 of 2 rows are scored"]
    assert "1 of 2" in printed.out


def test_trained_rows_are_left_out_on_request(tmp_path, capsys):
    write(tmp_path / "pred", "hotpotqa", [prediction("x", _id="1"), prediction(_id="2")])
    manifest = Manifest()
    manifest.add({"dataset": "hotpotqa", "_id": "1", "context": "c"}, held_out=False)
    manifest.write(tmp_path / "m.json")
    command = ["longbench", "score", "--predictions", str(tmp_path / "pred"), "--exclude_trained"]
    assert cli.main(command) == 2
    assert "--manifest is needed" in capsys.readouterr().err
    assert cli.main([*command, "--manifest", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "pred" / "scores.json").read_text())["hotpotqa"]["score"] == 100.0


def test_report_compares_named_runs(tmp_path, capsys):
    for name, share in (("good", 0.9), ("bad", 0.2)):
        make_run(tmp_path / name, share)
    command = ["longbench", "report", "--predictions", str(tmp_path / "good")]
    assert cli.main([*command, "--compare", f"before={tmp_path / 'bad'}"]) == 0
    page = (tmp_path / "good" / "report.html").read_text(encoding="utf-8")
    assert "before" in page and "LongBench: good" in page
    assert (tmp_path / "good" / "report.md").is_file()
    capsys.readouterr()
    assert cli.main([*command, "--compare", f"good={tmp_path / 'bad'}"]) == 2
    assert "two runs are called 'good'" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["score", "report"])
def test_a_folder_that_is_not_there(tmp_path, capsys, action):
    assert cli.main(["longbench", action, "--predictions", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err

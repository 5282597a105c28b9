"""Scores of data sets and folders: LongBench's figures, and what is incomplete, trained on or strange."""

import json
import sys

import pytest

from mindformers_glm32k.data.longbench import Manifest, document_key
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench import score_rows
from mindformers_glm32k.longbench.predictions import read_predictions
from mindformers_glm32k.longbench.score import loops, row_scores, score_folder


def prediction(pred="Oslo", answers=("Oslo",), length=100, **more):
    return {"pred": pred, "answers": list(answers), "all_classes": None, "length": length, **more}


def write(folder, dataset, rows, end="\n"):
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / f"{dataset}.jsonl").write_text(text + end, encoding="utf-8")


def test_golden_data_sets_and_buckets(reference):
    golden = json.loads((reference / "longbench" / "golden_metrics.json").read_text(encoding="utf-8"))
    assert len(golden["scores"]) == len(golden["scores_e"]) == 21
    for dataset, score in golden["scores"].items():
        rows = [row for row in golden["rows"] if row["dataset"] == dataset]
        assert score_rows(dataset, rows) == {"score": score, "score_e": golden["scores_e"][dataset]}, dataset
        assert score_rows(f"{dataset}_e", rows)["score"] == score


def test_golden_folder_through_the_files(reference, tmp_path):
    golden = json.loads((reference / "longbench" / "golden_metrics.json").read_text(encoding="utf-8"))
    for dataset in golden["scores"]:
        write(tmp_path / "pred", dataset, [row for row in golden["rows"] if row["dataset"] == dataset])
    path = score_folder(tmp_path / "pred").write()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert {name: entry["score"] for name, entry in written.items()} == golden["scores"]
    assert {name: entry["score_e"] for name, entry in written.items()} == golden["scores_e"]
    for entry in written.values():
        low, high = entry["interval"]
        assert low <= entry["score"] <= high
        assert high - low > 5 or entry["score"] in (0.0, 100.0), "eight rows say little"


def test_classes_are_those_of_the_last_row():
    rows = [{**prediction("B", ["B"]), "all_classes": ["B"]}, {**prediction("A", ["A"]), "all_classes": ["A"]}]
    assert score_rows("trec", rows)["score"] == 50.0


def test_the_result_does_not_depend_on_the_depth_of_the_caller():
    """ROUGE-L recurses a word at a time: 700 common words fit into Python's limit of 1000 frames, 1500 do not."""

    def deep(levels, words):
        if levels:
            return deep(levels - 1, words)
        text = " ".join(f"w{number}" for number in range(words))
        return row_scores("gov_report", [prediction(text, [text])])[0]

    assert deep(0, 700) == deep(600, 700) > 0.99
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20000)
    try:
        assert deep(0, 1500) == 0.0
        assert sys.getrecursionlimit() == 20000
    finally:
        sys.setrecursionlimit(limit)


def test_intervals_are_the_same_each_time_and_narrow_with_more_rows(tmp_path):
    rows = [prediction("Oslo" if index % 3 else "Rome") for index in range(400)]
    write(tmp_path / "a", "hotpotqa", rows)
    write(tmp_path / "a", "musique", rows[:40])
    first, again = (score_folder(tmp_path / "a").datasets for _ in range(2))
    many, few = (first[name].summary()["interval"] for name in ("hotpotqa", "musique"))
    assert first["hotpotqa"].summary() == again["hotpotqa"].summary()
    assert 8 < many[1] - many[0] < 11, "1.96 * 2 * sqrt(p (1 - p) / 400) = 9.2 points"
    assert 24 < few[1] - few[0] < 34, "29 points"


def test_incomplete_sets_are_said_to_be(tmp_path):
    write(tmp_path / "a", "hotpotqa", [prediction(_id="1", stamp={"samples": 3}), prediction(_id="2")])
    scores = score_folder(tmp_path / "a")
    assert scores.datasets["hotpotqa"].expected == 3, "from the stamp"
    assert scores.datasets["hotpotqa"].summary()["complete"] is False
    assert scores.warnings() == ["hotpotqa: INCOMPLETE, 2 of 3 rows are scored"]
    scores = score_folder(tmp_path / "a", {"hotpotqa": 2, "musique": 5})
    assert scores.datasets["hotpotqa"].summary()["complete"] is True, "the data says more than the stamp"
    assert scores.warnings() == ["musique: NO PREDICTIONS"]
    write(tmp_path / "b", "hotpotqa", [prediction()])
    assert score_folder(tmp_path / "b").datasets["hotpotqa"].summary()["complete"] is None
    assert score_folder(tmp_path / "b").warnings() == ["whether all rows are there is not known; --data tells"]


def test_rows_that_were_trained_on_are_flagged_and_left_out_on_request(tmp_path):
    manifest = Manifest()
    manifest.add({"dataset": "hotpotqa", "_id": "1", "context": "one document"}, held_out=False)
    manifest.add({"dataset": "hotpotqa", "_id": "4", "context": "another"}, held_out=True)
    rows = [
        prediction("Rome", _id="1", document=document_key("x").hex()),
        prediction("Rome", _id="2", document=document_key(" one document\n").hex()),
        prediction("Oslo", _id="3", document=document_key("a third").hex()),
        prediction("Oslo", _id="4", document=document_key("another").hex()),
        prediction("Oslo"),
    ]
    write(tmp_path / "a", "hotpotqa", rows)
    found = score_folder(tmp_path / "a", {"hotpotqa": 5}, manifest)
    assert found.datasets["hotpotqa"].summary()["trained_on"] == 2
    assert found.datasets["hotpotqa"].score == 60.0
    assert "TRAINED ON 2 of the rows" in found.warnings()[0]
    assert "1 lines have no _id" in found.warnings()[1]
    found = score_folder(tmp_path / "a", {"hotpotqa": 5}, manifest, exclude=True)
    entry = found.datasets["hotpotqa"].summary()
    assert (entry["score"], entry["rows"], entry["left_out"], entry["complete"]) == (100.0, 3, 2, True)
    write(tmp_path / "b", "hotpotqa", rows[:2])
    with_nothing_left = score_folder(tmp_path / "b", None, manifest, exclude=True)
    assert not with_nothing_left.datasets and "every row was trained on" in with_nothing_left.warnings()[0]


def test_doubles_torn_lines_and_mixed_stamps_are_counted(tmp_path):
    rows = [
        prediction("Oslo", _id="1", stamp={"samples": 2, "model": "a"}),
        prediction("Rome", _id="1", stamp={"samples": 2, "model": "a"}),
        prediction("Rome", _id="2", stamp={"samples": 2, "model": "b"}),
    ]
    write(tmp_path / "a", "hotpotqa", rows, end='\n{"pred": "Os')
    scores = score_folder(tmp_path / "a")
    assert scores.datasets["hotpotqa"].score == 50.0
    assert [line.split(": ")[1][:12] for line in scores.warnings()] == ["the last lin", "1 lines repe", "MIXED, the l"]


def test_a_last_line_without_its_break_counts_when_it_is_whole(tmp_path):
    write(tmp_path / "a", "hotpotqa", [prediction(_id="1"), prediction(_id="2")], end="")
    rows, doubles, torn = read_predictions(tmp_path / "a" / "hotpotqa.jsonl")
    assert (len(rows), doubles, torn) == (2, 0, False)


def test_empty_answers_and_loops_are_counted(tmp_path):
    write(tmp_path / "a", "hotpotqa", [prediction(" \n"), prediction("no no no " * 9), prediction("Oslo")])
    entry = score_folder(tmp_path / "a").datasets["hotpotqa"].summary()
    assert (entry["empty"], entry["loops"]) == (1, 1)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I do not know. " * 4, True),
        ("The end. " + "我不知道。" * 8, True),
        ("prefix " + ("x" * 199 + "y") * 4 + "x" * 20, True),  # cut within a repetition
        ("ha ha ha", False),  # too short to be one
        ("aaaa bbbb cccc dddd eeee ffff", False),
        ("", False),
    ],
)
def test_loops(text, expected):
    assert loops(text) is expected


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"pred": 1, "answers": [], "all_classes": null, "length": 1}', "line 2: field 'pred' is int"),
        ('{"pred": "", "answers": [], "length": 1}', "line 2: field 'all_classes' is missing"),
        ("{", "line 2: broken JSON"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    write(tmp_path / "a", "hotpotqa", [prediction()], end=f"\n{line}\n")
    with pytest.raises(InputError, match=f"hotpotqa.jsonl: {message}"):
        score_folder(tmp_path / "a")


def test_folders_without_predictions_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        score_folder(tmp_path / "none")
    with pytest.raises(InputError, match="no predictions in it"):
        score_folder(tmp_path)
    with pytest.raises(InputError, match="trec: prediction 1: field 'all_classes' is empty"):
        score_rows("trec", [prediction()])
    with pytest.raises(InputError, match="no predictions to score"):
        score_rows("trec", [])

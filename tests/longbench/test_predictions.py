"""Files of predictions: every line once, whatever is killed when."""

import json
import multiprocessing

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench.predictions import PredictionFile, read_predictions

STAMP = {"model": "a", "samples": 3}
ROW = {"answers": ["Oslo"], "all_classes": None, "length": 3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "hotpotqa.jsonl"


def keys(path):
    return [json.loads(line)["_id"] for line in path.read_bytes().split(b"\n") if line]


def test_lines_are_appended_and_found_again(path):
    file = PredictionFile(path, STAMP)
    assert file.add("1", {**ROW, "pred": "Oslo"}) and file.add("2", {**ROW, "pred": "奥\u2028斯"})
    again = PredictionFile(path, STAMP)
    assert len(again) == 2 and "1" in again and "3" not in again
    assert again.add("3", {**ROW, "pred": ""}) and not file.add("3", {**ROW, "pred": "late"}), (
        "another process was first"
    )
    assert keys(path) == ["1", "2", "3"]
    rows, doubles, torn = read_predictions(path)
    assert [row["pred"] for row in rows] == ["Oslo", "奥\u2028斯", ""] and (doubles, torn) == (0, False)
    assert all(row["stamp"] == STAMP for row in rows)


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_half_a_line_is_cut_off_and_written_again(path, cut):
    file = PredictionFile(path, STAMP)
    file.add("1", {**ROW, "pred": "x"})
    whole = path.read_bytes()
    file.add("2", {**ROW, "pred": "y"})
    both = path.read_bytes()
    path.write_bytes(both[:-cut])
    again = PredictionFile(path, STAMP)
    assert path.read_bytes() == whole and "2" not in again
    assert again.add("2", {**ROW, "pred": "y"})
    assert path.read_bytes() == both


def test_half_a_line_that_appears_later_is_cut_off_too(path):
    file = PredictionFile(path, STAMP)
    with open(path, "ab") as other:
        other.write(b'{"pred": "of a process that was kil')
    file.add("1", {**ROW, "pred": "x"})
    assert keys(path) == ["1"]


@pytest.mark.parametrize(
    "line, message",
    [
        ({**ROW, "pred": "", "_id": "1", "stamp": {**STAMP, "model": "b"}}, "model 'b', now 'a'"),
        ({**ROW, "pred": "", "_id": "1"}, "without a stamp"),
        ({**ROW, "pred": "", "_id": "1", "stamp": {**STAMP, "more": 1}}, "more 1, now None"),
        ({"pred": 1}, "field 'pred' is int"),
    ],
)
def test_lines_of_other_predictions_are_not_mixed_in(path, line, message):
    path.parent.mkdir()
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"hotpotqa.jsonl: .*{message}"):
        PredictionFile(path, STAMP)
    assert path.read_bytes() == before


def test_half_characters_do_not_damage_the_file(path):
    PredictionFile(path, STAMP).add("1", {**ROW, "pred": "a \ud800 b"})
    assert "1" in PredictionFile(path, STAMP)
    assert read_predictions(path)[0][0]["pred"] == "a ? b"


def _write(path, numbers):
    file = PredictionFile(path, STAMP)
    for number in numbers:
        file.add(str(number), {**ROW, "pred": "x" * (number % 50)})


def test_processes_that_overlap_write_each_sample_once(path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(path, range(start, start + 60))) for start in (0, 20, 40, 0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(map(int, keys(path))) == list(range(100))

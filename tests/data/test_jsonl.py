"""Checks of JSON-lines files and reading them at random."""
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from mindformers_glm32k.data import jsonl
from mindformers_glm32k.data.jsonl import MAX_PROBLEMS, JsonLines
from mindformers_glm32k.errors import InputError


def write(path, *lines, end="\n"):
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def test_records_are_read_in_any_order(tmp_path):
    records = [{"n": n, "text": "长" * n + "\u2028x"} for n in range(50)]
    path = write(tmp_path / "a.jsonl", *(json.dumps(record, ensure_ascii=False) for record in records))
    lines = JsonLines(path)
    assert len(lines) == 50
    assert [lines[n] for n in (49, 0, 17)] == [records[n] for n in (49, 0, 17)]
    with pytest.raises(IndexError):
        lines[50]


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": 1}\r\n', '\ufeff{"a": 1}\n', '{"a": 1}\n\n  \n'])
def test_line_ends_byte_order_mark_and_empty_lines_at_the_end_do_not_matter(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode("utf-8"))
    assert [JsonLines(path)[index] for index in range(len(JsonLines(path)))] == [{"a": 1}]


def test_every_bad_line_is_named_with_its_number(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}', '{"a": ', "", "[1]", '{"a": 2}')
    with pytest.raises(InputError) as error:
        JsonLines(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "line 2: broken JSON" in message and "line 3: empty line" in message and "line 4: a JSON object" in message
    assert "line 1:" not in message and "line 5:" not in message


def test_a_cut_off_last_line_is_called_so(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}', '{"a": "some te', end="")
    with pytest.raises(InputError, match="line 2: broken JSON.*cut off"):
        JsonLines(path)


def test_a_message_stays_short_when_all_lines_are_bad(tmp_path):
    path = write(tmp_path / "a.jsonl", *["x" * 10000] * 100)
    with pytest.raises(InputError) as error:
        JsonLines(path)
    assert str(error.value).count("line ") >= MAX_PROBLEMS and len(str(error.value)) < 1500
    assert "and more" in str(error.value)


@pytest.mark.parametrize("raw, message", [
    (b"", "is empty"),
    (b"\n \n", "only empty lines"),
    (b'{"a": "\xff"}\n', "line 1: not UTF-8"),
    (b'[{"a": 1}]\n', "one JSON array"),
    (b'[\n{"a": 1}\n]\n', "one JSON array"),
    (b'{"a":' * 100000 + b"\n", "line 1"),
])
def test_other_files_that_are_no_json_lines(tmp_path, raw, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        JsonLines(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.jsonl: no such file"):
        JsonLines(tmp_path / "nothing.jsonl")


def test_the_check_of_the_caller_gets_each_record_and_its_complaint_gets_the_place(tmp_path):
    def check(record):
        if record["a"] == 2:
            raise InputError("two is too many")
    path = write(tmp_path / "a.jsonl", '{"a": 1}', '{"a": 2}')
    with pytest.raises(InputError, match="a.jsonl: line 2: two is too many"):
        JsonLines(path, check)


def test_reading_from_threads_and_after_pickling(tmp_path):
    path = write(tmp_path / "a.jsonl", *(json.dumps({"n": n, "pad": "x" * (n % 7) * 100}) for n in range(200)))
    lines = JsonLines(path)
    with ThreadPoolExecutor(8) as pool:
        assert [record["n"] for record in pool.map(lines.__getitem__, range(200))] == list(range(200))
    assert pickle.loads(pickle.dumps(lines))[150]["n"] == 150


def test_a_file_that_changes_after_the_check_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}', '{"a": 2}')
    lines = JsonLines(path)
    write(path, '{"a": "something longer"}', '{"a": 2}')
    with pytest.raises(InputError, match="has changed"):
        lines[1]


def test_a_big_file_is_checked_at_both_ends_and_the_rest_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "CHECKED_BYTES", 100)
    good = [json.dumps({"n": number}) for number in range(40)]
    path = write(tmp_path / "a.jsonl", *good[:30], '{"n": ', *good[31:])
    lines = JsonLines(path)
    assert [lines[n]["n"] for n in (0, 29, 31, 39)] == [0, 29, 31, 39]
    with pytest.raises(InputError, match="a.jsonl: line 31: broken JSON"):
        lines[30]
    write(path, *good, '{"n": 40')
    with pytest.raises(InputError, match="a.jsonl: line 41: broken JSON"):
        JsonLines(path)
    write(path, '{"n": ', *good, '{"n": 40')
    with pytest.raises(InputError, match="line 1: broken JSON.*line 42: broken JSON"):
        JsonLines(path)

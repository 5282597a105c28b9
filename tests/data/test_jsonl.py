"""Checks of JSON-lines files and reading them at random."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from mindformers_glm32k.data import jsonl
from mindformers_glm32k.data.jsonl import MAX_PROBLEMS, JsonLines, first_record
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


DAMAGED = {
    "broken JSON": b'{"a": 1, \n',
    "not UTF-8 at byte 7": b'{"a": "\xff"}\n',
    "a JSON object is needed": b"[1]\n",
    "'a' is missing": b'{"b": 1}\n',
    "'a' is str": b'{"a": "1"}\n',
    "longer than 1 MB": b'{"a": ' + b"1" * (3 << 20) + b"}\n",
}


def whole_numbers(record):
    if "a" not in record:
        raise InputError("field 'a' is missing")
    if not isinstance(record["a"], int):
        raise InputError(f"field 'a' is {type(record['a']).__name__}")


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_each_kind_of_damage_is_named_or_skipped(tmp_path, monkeypatch, kind, at):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 20)
    lines = [b'{"a": %d}\n' % number for number in range(4)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines[:at] + [DAMAGED[kind]] + lines[at:]))
    with pytest.raises(InputError, match=f"a.jsonl: line {at + 1}: .*{kind}"):
        JsonLines(path, whole_numbers)
    records = JsonLines(path, whole_numbers, on_error="skip")
    assert [records[number]["a"] for number in range(len(records))] == [0, 1, 2, 3]
    assert [records.line(number) for number in range(4)] == [line for line in range(1, 6) if line != at + 1]
    assert records.sizes([3]).tolist() == [9] and records.problems.count == 1
    assert f"line {at + 1}: " in records.problems.text() and kind in records.problems.text()
    assert pickle.loads(pickle.dumps(records))[3] == {"a": 3}
    with pytest.raises(IndexError):
        records[4]


def test_all_skipped_lines_are_counted_and_the_first_ones_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}', *["x"] * 9, "", '{"a": 2}')
    records = JsonLines(path, on_error="skip")
    assert (len(records), records.problems.count, records.line(1)) == (2, 9, 12)
    assert "line 6: broken" in records.problems.text() and records.problems.text().endswith("; and 4 more")
    with pytest.raises(InputError, match="line 1: broken JSON.*no line is left"):
        JsonLines(write(tmp_path / "b.jsonl", "x", "y"), on_error="skip")
    with pytest.raises(InputError, match="on_error: 'ignore' is not one of raise, skip"):
        JsonLines(path, on_error="ignore")


def test_the_first_record_may_be_looked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", "x", '{"b": 1}', '{"a": 1}')
    assert first_record(path, whole_numbers, "skip") == {"a": 1} and first_record(path, on_error="skip") == {"b": 1}
    with pytest.raises(InputError, match="line 1: broken JSON"):
        first_record(path)
    with pytest.raises(InputError, match="line 1.*line 2: field 'a' is missing"):
        first_record(write(tmp_path / "b.jsonl", "x", '{"b": 1}'), whole_numbers, "skip")


def test_a_line_of_200_mb_is_never_in_memory(tmp_path):
    """The peak of a process that skips it: what a line costs shows in it, as the sound lines here do."""
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"a": "')
        file.seek(200 << 20)  # a hole in the file, which reads as zeros
        file.write(b'"}\n{"a": 1}\n')
    program = (
        "import sys, resource; from mindformers_glm32k.data.jsonl import JsonLines, first_record\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "first = first_record(sys.argv[1], on_error='skip')\n"
        "lines = JsonLines(sys.argv[1], on_error='skip')\n"
        "print(first, len(lines), lines.problems.text())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
    )
    found, grown = run.stdout.splitlines()
    assert found.startswith("{'a': 1} 1 ") and "line 1: longer than 64 MB" in found
    assert int(grown) < 150 << 10, "kB"


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


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "is empty"),
        (b"\n \n", "only empty lines"),
        (b'{"a": "\xff"}\n', "line 1: not UTF-8"),
        (b'[{"a": 1}]\n', "one JSON array"),
        (b'[\n{"a": 1}\n]\n', "one JSON array"),
        (b'{"a":' * 100000 + b"\n", "line 1"),
    ],
)
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


def test_a_record_that_is_refused_is_not_called_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"b": 1}')
    with pytest.raises(InputError, match="line 1: field 'a' is missing$"):
        JsonLines(path, whole_numbers)

"""LongBench to AdGen lines: nothing lost, nothing half written, documents on one side."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest
from conftest import ROOT

from mindformers_glm32k import cli
from mindformers_glm32k.data.longbench import Manifest
from mindformers_glm32k.data.sources import SampleSource, contamination_warning
from mindformers_glm32k.longbench import preprocess

SCRIPT = ROOT / "research" / "glm32k" / "glm32k_preprocess.py"
PROMPTS = {"trec": "Types.\n\n{context}\n{input}", "qmsum": "Meeting {context} Query: {input}"}


def record(name, number, **change):
    return {
        "input": f"q{number}",
        "context": f"document {number} of {name} 长",
        "answers": [f"a{number}", "other"],
        "length": 4,
        "dataset": name,
        "language": "en",
        "all_classes": ["a", "b"] if name == "trec" else None,
        "_id": f"{name}-{number}",
        **change,
    }


def write(path, records):
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in PROMPTS:
        write(data / f"{name}.jsonl", [record(name, number) for number in range(20)])
    write(data / "trec_e.jsonl", [record("trec", number) for number in range(100, 103)])
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return data


def run(folder, *options, data=None):
    return cli.main(
        [
            "preprocess",
            "--data_path",
            str(data or folder),
            "--output_path",
            str(folder.parent / "out"),
            "--prompt_config_file",
            str(folder.parent / "prompts.json"),
            *map(str, options),
        ]
    )


def test_every_record_becomes_a_row_that_can_be_traced_and_scored(folder, capsys):
    assert run(folder, "--is_longbench_e", "False") == 0
    rows = read(folder.parent / "out" / "longbench.jsonl")
    assert [row["_id"] for row in rows] == [f"{name}-{number}" for name in sorted(PROMPTS) for number in range(20)]
    source = record("trec", 7)
    row = rows[27]
    assert row == {
        "content": PROMPTS["trec"].format(**source),
        "summary": "a7",
        "context_span": [8, 8 + len(source["context"])],
        **{key: source[key] for key in ("dataset", "_id", "length", "answers", "language", "all_classes")},
    }
    assert row["content"][slice(*row["context_span"])] == source["context"]
    printed = capsys.readouterr()
    assert "1 files of LongBench-E left out; --is_longbench_e True takes them" in printed.out
    assert "TRAINED ON LONGBENCH'S TEST SET" in printed.err and "--holdout 0.1" in printed.err
    assert re.search(r"^all +40 +0 +4 +4 +4$", printed.out, re.MULTILINE)


@pytest.mark.parametrize("options", [(), ("--is_longbench_e",), ("--is_longbench_e", "True")])
def test_longbench_e_is_a_boolean_and_the_default(folder, options):
    assert run(folder, *options) == 0
    assert len(read(folder.parent / "out" / "longbench_e.jsonl")) == 3
    assert not (folder.parent / "out" / "longbench.jsonl").exists()


def test_a_row_for_each_answer(folder):
    write(
        folder / "trec_e.jsonl",
        [record("trec", number, answers=[f"a{number}", " ", "other"], context="") for number in range(100, 103)],
    )
    assert run(folder, "--all_answers") == 0
    rows = read(folder.parent / "out" / "longbench_e.jsonl")
    assert [(row["_id"], row["summary"]) for row in rows[:2]] == [("trec-100", "a100"), ("trec-100", "other")]
    assert len(rows) == 6 and rows[1]["answers"] == ["a100", " ", "other"]


def test_documents_are_never_on_both_sides(folder, capsys):
    shared = [record(name, number, context=f" the {number}. text\n") for name in PROMPTS for number in range(60)]
    for name in PROMPTS:
        write(folder / f"{name}.jsonl", [one for one in shared if one["dataset"] == name])
    assert run(folder, "--is_longbench_e", "False", "--holdout", "0.3", "--seed", "5", "--all_answers") == 0
    out = folder.parent / "out"
    train, held_out = read(out / "longbench.jsonl"), read(out / "heldout" / "longbench.jsonl")
    assert len(train) + len(held_out) == 240 and 40 < len(held_out) < 110
    documents = [{row["content"][slice(*row["context_span"])] for row in rows} for rows in (train, held_out)]
    assert not documents[0] & documents[1]
    manifest = Manifest.read(out / "longbench.manifest.json")
    assert (manifest.holdout, manifest.seed) == (0.3, 5)
    for rows, ids in ((train, manifest.trained), (held_out, manifest.held_out)):
        assert {name: set(of_name) for name, of_name in ids.items()} == {
            name: {row["_id"] for row in rows if row["dataset"] == name} for name in PROMPTS
        }
        assert sum(map(len, ids.values())) == len(rows) / 2, "each once"
    assert len(SampleSource(out)) == len(train), "a run that is given the folder does not read what is held out"
    assert capsys.readouterr().err == "", "no loud sentence"
    assert run(folder, "--is_longbench_e", "False", "--holdout", "0.3", "--seed", "6") == 0
    assert documents[0] != {row["content"][slice(*row["context_span"])] for row in read(out / "longbench.jsonl")}


def test_rows_without_a_holdout_are_said_loudly_when_they_are_trained_on(folder, capsys):
    assert run(folder, "--holdout", "0.5") == 0
    out = folder.parent / "out"
    assert contamination_warning(SampleSource(out)) == []
    capsys.readouterr()
    assert run(folder) == 0
    assert "heldout/longbench_e.jsonl: not of this run, and its records are trained on now" in capsys.readouterr().out
    [warning] = contamination_warning(SampleSource(out))
    assert "TRAINED ON LONGBENCH'S TEST SET" in warning and str(out / "longbench_e.jsonl") in warning
    assert contamination_warning(SampleSource(out / "heldout"))
    (out / "longbench_e.manifest.json").unlink()
    assert contamination_warning(SampleSource(out))


def test_the_published_zip_file_is_read_as_it_is(folder, capsys):
    archive = folder.parent / "data.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.iterdir(), reverse=True):
            file.write(path, f"data/{path.name}")
        file.writestr("__MACOSX/data/._trec.jsonl", b"\0")
        file.writestr("data/readme.txt", b"hello")
    assert run(folder, "--is_longbench_e", "False") == 0
    from_folder = (folder.parent / "out" / "longbench.jsonl").read_bytes()
    assert run(folder, "--is_longbench_e", "False", data=archive) == 0
    assert (folder.parent / "out" / "longbench.jsonl").read_bytes() == from_folder
    assert "data.zip:data/readme.txt: skipped, not one of LongBench's" in capsys.readouterr().out


def test_a_damaged_zip_file_is_named_and_nothing_is_written(folder, capsys):
    archive = folder.parent / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "trec.jsonl", "data/trec.jsonl")
    raw = bytearray(archive.read_bytes())
    raw[200] ^= 1
    archive.write_bytes(raw)
    assert run(folder, "--is_longbench_e", "False", data=archive) == 2
    assert "data.zip:data/trec.jsonl: cannot be unpacked (Bad CRC-32" in capsys.readouterr().err
    archive.write_bytes(raw[:100])
    assert run(folder, data=archive) == 2
    assert "no zip file" in capsys.readouterr().err
    assert not list(folder.parent.glob("out/*"))


DAMAGE = [
    (b'{"input": "\n', "line 3: broken JSON"),
    (b'{"input": "\xff"}\n', "line 3: not UTF-8"),
    (b"[]\n", "line 3: a JSON object is needed"),
    (b'{"dataset": "trec"}\n', "line 3: column 'context' is missing"),
    (json.dumps(record("trec", 0, answers="a")).encode() + b"\n", "line 3: field 'answers' is 'a'"),
    (json.dumps(record("trec", 0, answers=["a", 3])).encode() + b"\n", r"line 3: column 'answers[1]' is int"),
    (json.dumps(record("trec", 0, _id=[1])).encode() + b"\n", "line 3: field '_id' is list"),
    (json.dumps(record("other", 0)).encode() + b"\n", "line 3: no prompt for the data set 'other'"),
]


@pytest.mark.parametrize("line, message", DAMAGE)
def test_damaged_lines_are_fatal_or_skipped(folder, capsys, line, message):
    path = folder / "trec_e.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + line + b"\n" + lines[2])
    assert run(folder, "--all_answers") == 2
    assert f"{path}: {message}" in capsys.readouterr().err and not list(folder.parent.glob("out/*"))
    assert run(folder, "--all_answers", "--on_error", "skip") == 0
    assert f"1 damaged lines skipped: {path}: {message}" in capsys.readouterr().out
    assert len(read(folder.parent / "out" / "longbench_e.jsonl")) == 6


@pytest.mark.parametrize(
    "options, message",
    [
        (("--holdout", "1.5"), "--holdout: 1.5 is not within 0.0 and 0.9"),
        (("--seed", "-1"), "--seed: -1"),
        (("--data_path", "nowhere"), "--data_path nowhere: no such file or folder"),
        (("--prompt_config_file", "nowhere"), "prompt file nowhere: no such file"),
        (("--tokenizer", "nowhere"), "vocabulary file nowhere: no such file"),
        (("--data_path", "."), "no files of LongBench-E .* in it. Did you mean data?"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(folder, capsys, options, message):
    assert run(folder, *options) == 2
    assert re.search(message, capsys.readouterr().err) and not (folder.parent / "out").exists()


def test_a_boolean_that_is_none_is_a_usage_error(folder, capsys):
    with pytest.raises(SystemExit):
        run(folder, "--is_longbench_e", "maybe")
    assert "'maybe' is neither True nor False" in capsys.readouterr().err


def test_a_data_set_without_a_prompt_is_found_before_the_work(folder, capsys):
    write(folder / "zzz_e.jsonl", [record("zzz", 0)])
    assert run(folder) == 2
    assert "no prompt for the data set 'zzz'" in capsys.readouterr().err and not list(folder.parent.glob("out/*"))


def test_output_in_the_data_folder_is_not_read_again(folder, capsys):
    options = [
        "preprocess",
        "--data_path",
        str(folder),
        "--output_path",
        str(folder),
        "--prompt_config_file",
        str(folder.parent / "prompts.json"),
    ]
    assert cli.main(options) == 0
    first = (folder / "longbench_e.jsonl").read_bytes()
    assert cli.main(options) == 0 and (folder / "longbench_e.jsonl").read_bytes() == first
    assert "longbench_e.jsonl: skipped, this is a name that the output has" in capsys.readouterr().out


def test_with_a_tokenizer_lengths_are_counted_and_drawn(folder, capsys, small_vocab_file):
    assert run(folder, "--tokenizer", small_vocab_file) == 0
    assert "Lengths of prompts in tokens" in capsys.readouterr().out
    assert (folder.parent / "out" / "longbench_e_lengths.png").read_bytes().startswith(b"\x89PNG")
    assert run(folder, "--tokenizer", small_vocab_file.parent) == 0, "its folder will do"


def command(folder, *options):
    return [
        sys.executable,
        str(SCRIPT),
        "--data_path",
        str(folder),
        "--output_path",
        str(folder.parent / "out"),
        "--prompt_config_file",
        str(folder.parent / "prompts.json"),
        *options,
    ]


def test_the_script_has_upstreams_options(folder):
    done = subprocess.run(
        command(folder, "--is_longbench_e", "False"),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert len(read(folder.parent / "out" / "longbench.jsonl")) == 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_output(folder, number):
    out = folder.parent / "out"
    data = write(folder.parent / "slow.jsonl", [record("trec", n, context="word " * 20000) for n in range(400)])
    slow = folder.parent / "slow"
    slow.mkdir()
    for place in range(30):
        os.link(data, slow / f"slow{place}_e.jsonl")
    process = subprocess.Popen(
        command(folder, "--data_path", str(slow)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in out.glob(".*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "it has ended before it was killed"
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == []


def test_memory_does_not_grow_with_the_data(folder):
    """Peak of the process for 2 MB and for 80 MB of data."""
    one = write(folder.parent / "one.jsonl", [record("trec", n, context=f"{n} " + "word " * 4000) for n in range(100)])
    peaks = []
    for count in (1, 40):
        data = folder.parent / f"data{count}"
        data.mkdir()
        for place in range(count):
            os.link(one, data / f"part{place}_e.jsonl")
        program = (
            "import resource, sys; from mindformers_glm32k import cli; assert cli.main(sys.argv[1:]) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        options = command(folder, "--data_path", str(data))[2:]
        done = subprocess.run(
            [sys.executable, "-c", program, "preprocess", *options],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert (folder.parent / "out" / "longbench_e.jsonl").stat().st_size > 80e6
    assert peaks[1] - peaks[0] < 8 << 10, "kB"


@pytest.mark.parametrize("is_longbench_e", [True, False])
def test_the_reference_set_keeps_every_row(reference, tmp_path, is_longbench_e):
    folder = reference / "longbench"
    assert (
        cli.main(
            [
                "preprocess",
                "--data_path",
                str(folder / "data"),
                "--output_path",
                str(tmp_path / "out"),
                "--prompt_config_file",
                str(folder / "dataset2prompt.json"),
                "--is_longbench_e",
                str(is_longbench_e),
            ]
        )
        == 0
    )
    files = sorted(path for path in (folder / "data").iterdir() if path.stem.endswith("_e") == is_longbench_e)
    records = [one for path in files for one in read(path)]
    prompts = json.loads((folder / "dataset2prompt.json").read_text(encoding="utf-8"))
    source = SampleSource(tmp_path / "out")
    assert len(source) == len(records) == (18 if is_longbench_e else 13)
    for index, (row, one) in enumerate(zip(read(next((tmp_path / "out").glob("*.jsonl"))), records)):
        assert row["content"] == prompts[one["dataset"]].format(**one) == source[index].prompt
        assert row["summary"] == one["answers"][0] == source[index].answer
        assert row["content"][slice(*source[index].context)] == one["context"]
        assert all(row[key] == one[key] for key in preprocess.KEPT_FIELDS)

"""Predictions through the command: the prompts of pred.py, resuming, stamps, several processes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench import predict as prediction
from mindformers_glm32k.longbench.predictions import read_predictions
from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from tests.conftest import ROOT
from tests.longbench.server import serving
from tests.longbench.test_samples import record, write

TEMPLATES = {"trec": "{context} {input}", "samsum": "{context}\n{input}", "hotpotqa": "{context}\n\nQ: {input}"}


@pytest.fixture
def command(tmp_path, small_vocab_file):
    """The arguments of predict for 40 samples of two data sets."""
    write(tmp_path / "data" / "trec.jsonl", [record("trec", f"t{number}") for number in range(25)])
    write(tmp_path / "data" / "hotpotqa_e.jsonl", [record("hotpotqa", f"h{number}") for number in range(15)])
    (tmp_path / "prompts.json").write_text(json.dumps(TEMPLATES))
    return [
        *("longbench", "predict", "--data", str(tmp_path / "data"), "--tokenizer", str(small_vocab_file)),
        *("--prompt_config_file", str(tmp_path / "prompts.json"), "--output_dir", str(tmp_path / "out")),
    ]


def predicted(folder):
    rows, doubles = {}, 0
    for path in folder.glob("*.jsonl"):
        rows[path.stem], again, torn = read_predictions(path)
        doubles += again + torn
    assert doubles == 0
    return rows


def test_every_golden_prompt_goes_to_the_engine(reference, tmp_path):
    folder = reference / "longbench"
    golden = json.loads((folder / "golden_prompt_ids.json").read_text(encoding="utf-8"))
    for max_length in (3500, 31500):
        with serving(reply=lambda body: hashlib.sha256(np.array(body["prompt"], "<i4").tobytes()).hexdigest()) as (
            url,
            _,
        ):
            status = cli.main(
                [
                    *("longbench", "predict", "--base_url", url, "--data", str(folder / "data")),
                    *("--prompt_config_file", str(folder / "dataset2prompt.json")),
                    *("--tokenizer", str(reference / "tokenizer"), "--output_dir", str(tmp_path / str(max_length))),
                    *("--max_length", str(max_length)),
                ]
            )
            assert status == 0
        rows = predicted(tmp_path / str(max_length))
        wanted = [entry for entry in golden if entry["max_length"] == max_length]
        assert len(wanted) == sum(map(len, rows.values())) == 31
        for entry in wanted:
            lines = (folder / "data" / entry["file"]).read_text(encoding="utf-8").splitlines()
            key = json.loads(lines[entry["index"]])["_id"]
            found = next(row for row in rows[entry["file"][: -len(".jsonl")]] if row["_id"] == key)
            assert (found["pred"], found["prompt_tokens"]) == (entry["sha256"], entry["n_ids"]), entry


def test_answer_lengths_are_those_of_longbench(reference):
    published = json.loads((reference / "longbench" / "dataset2maxlen.json").read_text(encoding="utf-8"))
    assert published == prediction.MAX_NEW_TOKENS


def test_samsum_stops_at_a_line_break_but_not_at_once(small_vocab_file):
    vocabulary = Vocabulary(small_vocab_file)
    prompts = prediction.Prompts(vocabulary, None, prediction.Options())
    found = prompts.request(("samsum", "1"), {"dataset": "samsum", "content": "some words"})
    assert found.stop_ids == (vocabulary.eos_id, vocabulary.encode("\n")[-1])
    assert (found.min_new_tokens, found.max_new_tokens, found.chat, found.text) == (1, 128, False, "some words")
    other = prompts.request(("qasper_e", "1"), {"dataset": "qasper", "content": "some words"})
    assert (other.stop_ids, other.min_new_tokens, other.max_new_tokens) == ((vocabulary.eos_id,), 0, 128)
    assert (other.chat, other.text) == (True, "some words")
    roles = prediction.Prompts(vocabulary, None, prediction.Options(stop_at_roles=True))
    assert list(roles.request(("qasper", "1"), {"dataset": "qasper", "content": "x"}).stop_ids) == chat.stop_ids(
        vocabulary
    )


def test_lines_hold_what_scores_and_reports_need(command, tmp_path):
    with serving() as (url, _):
        assert cli.main([*command, "--base_url", url]) == 0
    rows = predicted(tmp_path / "out")
    assert {name: len(found) for name, found in rows.items()} == {"trec": 25, "hotpotqa_e": 15}
    row = next(row for row in rows["hotpotqa_e"] if row["_id"] == "h3")
    stamp = row["stamp"]
    assert (row["pred"], row["answers"], row["all_classes"], row["length"]) == ("Oslo", ["a"], None, 2)
    assert (row["dataset"], row["input"], row["language"]) == ("hotpotqa", "why?", None)
    assert (stamp["model"], stamp["samples"], stamp["max_length"]) == ("served-model", 15, 31500)
    assert stamp["differs"] == ["the server stops at its own end tokens, too"]
    assert stamp["prompt"] != rows["trec"][0]["stamp"]["prompt"], "a digest of the template"


def test_a_second_run_asks_for_nothing_and_limits_go_on(command, tmp_path):
    with serving() as (url, server):
        assert cli.main([*command, "--base_url", url, "--limit", "10"]) == 0
        assert {name: len(rows) for name, rows in predicted(tmp_path / "out").items()} == {"trec": 5, "hotpotqa_e": 5}
        assert cli.main([*command, "--base_url", url, "--limit", "20"]) == 0
        assert len(server.bodies) == 20
        assert cli.main([*command, "--base_url", url]) == cli.main([*command, "--base_url", url]) == 0
        assert len(server.bodies) == 40
    assert sum(map(len, predicted(tmp_path / "out").values())) == 40


def test_shards_share_the_work(command, tmp_path):
    with serving() as (url, server):
        for number in (1, 0, 2):
            assert cli.main([*command, "--base_url", url, "--shard", f"{number}/3"]) == 0
            if number == 1:
                assert len(server.bodies) == 13
    assert len(server.bodies) == sum(map(len, predicted(tmp_path / "out").values())) == 40


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "another"], "model 'served-model', now 'another'"),
        (["--max_length", "3500"], "max_length 31500, now 3500"),
        (["--send", "text"], "send 'ids', now 'text'"),
        (["--stop_at_roles"], "stop_at_roles False, now True"),
        (["--prompt_config_file", "other.json"], "prompt '"),
    ],
)
def test_predictions_made_otherwise_are_not_mixed(command, tmp_path, capsys, change, message):
    (tmp_path / "other.json").write_text(json.dumps({**TEMPLATES, "trec": "Other: {context}"}))
    with serving() as (url, server):
        assert cli.main([*command, "--base_url", url, "--limit", "4"]) == 0
        assert cli.main([*command, "--base_url", url, *change]) == 2
        assert len(server.bodies) == 4, "nothing is asked before the files are looked at"
    error = capsys.readouterr().err.splitlines()[-1]
    assert ".jsonl: has lines that were predicted otherwise" in error and message in error


def test_killed_five_times_and_every_sample_is_there_once(command, tmp_path):
    """kill -9 at random moments over 40 samples, with a server that drops connections and is too busy now and then."""
    rng = random.Random(0)
    files = [tmp_path / "out" / "trec.jsonl", tmp_path / "out" / "hotpotqa_e.jsonl"]

    def lines():
        return sum(path.read_bytes().count(b"\n") for path in files if path.is_file())

    faults = [rng.choice([None, None, None, "drop", 429, 500]) for _ in range(60)]
    with serving(delay=0.05, reply=lambda body: f"{len(body['prompt'])} 奥斯陆 " * 20, faults=faults) as (url, server):
        arguments = [*command, "--base_url", url, "--concurrency", "2", "--retries", "20"]
        for kill in range(6):
            process = subprocess.Popen(
                [sys.executable, "-m", "mindformers_glm32k", *arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if kill == 5:
                assert process.wait(timeout=120) == 0
                break
            target, deadline = lines() + rng.randint(2, 6), time.monotonic() + 60
            while lines() < target and time.monotonic() < deadline:
                time.sleep(rng.uniform(0, 0.01))
            time.sleep(rng.uniform(0, 0.05))
            assert process.poll() is None, "killed before it is done"
            process.send_signal(signal.SIGKILL)
            process.wait()
            if kill % 2:  # a line that the kill has torn
                with open(files[kill // 2 % 2], "ab") as file:
                    file.write(b'{"pred": "\xe5\xa5')
        asked = len(server.bodies)
    rows = predicted(tmp_path / "out")
    assert {row["_id"] for row in rows["trec"]} == {f"t{number}" for number in range(25)}
    assert {row["_id"] for row in rows["hotpotqa_e"]} == {f"h{number}" for number in range(15)}
    assert sum(map(len, rows.values())) == 40
    assert all(row["pred"] == f"{row['prompt_tokens']} 奥斯陆 " * 20 for found in rows.values() for row in found)
    assert 40 <= asked <= 40 + 5 * 4, "only what was under way is asked for again"


def test_an_interrupted_run_ends_at_once(command, tmp_path):
    with serving(reply=lambda body: time.sleep(20) or "late") as (url, server):
        process = subprocess.Popen(
            [sys.executable, "-m", "mindformers_glm32k", *command, "--base_url", url],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while server.hits < 16 and time.monotonic() < deadline:
            time.sleep(0.02)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert (
        error.splitlines()[-1] == "interrupted; the same command goes on where it stopped" and "Traceback" not in error
    )
    assert time.monotonic() - begun < 10, "and not when the server answers"


def test_rows_of_preprocess_and_of_make_data_are_predicted(tmp_path, small_vocab_file):
    rows = [
        {
            "content": f"Read this {number}. Why?",
            "summary": "a",
            "context_span": [5, 9],
            "dataset": "qasper",
            "_id": number,
        }
        for number in range(3)
    ]
    write(tmp_path / "heldout" / "longbench_e.jsonl", rows)
    with serving() as (url, server):
        status = cli.main(
            [
                *("longbench", "predict", "--base_url", url, "--data", str(tmp_path / "heldout" / "longbench_e.jsonl")),
                *("--tokenizer", str(small_vocab_file), "--output_dir", str(tmp_path / "out")),
            ]
        )
    assert status == 0
    found = predicted(tmp_path / "out")["qasper_e"]
    assert {row["_id"] for row in found} == {"0", "1", "2"} and found[0]["answers"] == ["a"]
    vocabulary = Vocabulary(small_vocab_file)
    wanted = [
        chat.conversation_ids(vocabulary, [{"role": "user", "content": row["content"]}], add_generation_prompt=True)
        for row in rows
    ]
    assert sorted(body["prompt"] for body in server.bodies) == sorted(wanted)
    assert prediction.row_of(rows[0], 1)["document"] == prediction.document_key("this").hex()


def test_all_predicts_scores_and_reports(command, tmp_path, capsys):
    arguments = ["longbench", "all", *command[2:], "--datasets", "hotpotqa_e"]
    with serving(reply=lambda body: "a") as (url, _):
        assert cli.main([*arguments, "--base_url", url]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert list(scores) == ["hotpotqa_e"] and scores["hotpotqa_e"]["complete"] is True
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "served-model" in page and "the server stops at its own end tokens, too" in page
    assert "NO PREDICTIONS" not in capsys.readouterr().err, "of those that were asked for"


@pytest.mark.parametrize(
    "change, message",
    [
        ([], "give --config YAML to answer with this plugin, or --base_url URL"),
        (["--base_url", "http://localhost:1/v1", "--shard", "3/3"], "--shard 3/3: K/N is needed"),
        (["--base_url", "http://localhost:1/v1", "--limit", "0"], "--limit: 0 is not a whole number of at least 1"),
        (["--base_url", "http://localhost:1/v1", "--lmit", "3"], "unknown option --lmit"),
        (["--base_url", "http://localhost:1/v1", "--timeout", "0"], "--timeout 0.0: must be more"),
    ],
)
def test_wrong_options_are_named(command, capsys, change, message):
    assert cli.main([*command, *change]) == 2
    assert message in capsys.readouterr().err


def test_a_record_without_answers_is_named(command, tmp_path, capsys):
    write(tmp_path / "data" / "trec.jsonl", [record("trec", 1), record("trec", 2, answers="a")])
    with serving() as (url, _):
        assert cli.main([*command, "--base_url", url]) == 2
    assert "trec.jsonl: line 2: field 'answers' is no list of texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, room, result",
    [(None, None, 31500), (3500, None, 3500), (None, 32768, 31500), (None, 256, "room"), (1000, 256, "error")],
)
def test_prompts_fit_into_the_model(small_vocab_file, asked, room, result):
    vocabulary = Vocabulary(small_vocab_file)
    options = prediction.Options(asked)
    around = len(chat.conversation_ids(vocabulary, [{"role": "user", "content": ""}], add_generation_prompt=True))
    if result == "error":
        with pytest.raises(InputError, match="--max_length 1000: .*seq_length 256 has room for"):
            prediction.fitted(options, room, vocabulary, ["hotpotqa"])
        return
    found = prediction.fitted(options, room, vocabulary, ["hotpotqa", "trec"]).max_length
    assert found == (256 - around - 64 if result == "room" else result)


@pytest.mark.parametrize(
    "document, answers, depth",
    [
        ("Paragraph 12: x. Paragraph 1: y", ["Paragraph 1"], 17 / 31),
        ("The city is Oslo. It is Oslo", ["none", "Oslo"], 12 / 28),
        ("a b c", ["a"], None),
        ("nothing", ["here"], None),
    ],
)
def test_depth_of_an_answer(document, answers, depth):
    found = prediction.answer_depth(document, answers)
    assert found is None if depth is None else found == pytest.approx(depth, abs=1e-4)

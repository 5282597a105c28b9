"""Files of answers: in order, resumed, shared, and never mixed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.answers import Options
from mindformers_glm32k.generation.sampling import Sampling
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from tests.conftest import ROOT
from tests.generation.answering import Echo, run


@pytest.fixture
def folder(tmp_path):
    rng = random.Random(0)
    rows = [{"_id": f"q{number}", "prompt": "word " * rng.randint(1, 30) + str(number)} for number in range(40)]
    rows[3] = {"messages": [{"role": "user", "content": "a chat"}]}
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def rows(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_stand_in_the_order_of_the_questions(folder, small_vocab_file):
    network = Echo(Vocabulary(small_vocab_file))
    assert run(folder, small_vocab_file, network=network) == (40, [])
    found = rows(folder)
    assert [row.get("_id", row.get("line")) for row in found] == [f"q{n}" if n != 3 else 4 for n in range(40)]
    assert found[0]["content"].endswith("奥斯陆") and found[0]["finish_reason"] == "stop"
    assert found[0]["content"].startswith(str(found[0]["prompt_tokens"]))
    lengths = [length for batch in network.batches for length in batch]
    assert lengths == sorted(lengths, reverse=True), "batches of like length, the longest first"
    stamp = json.loads((folder / "answers.jsonl.options.json").read_text())
    assert (stamp["engine"], stamp["max_new_tokens"]) == ("echo", 16)
    again = Echo(Vocabulary(small_vocab_file))
    assert run(folder, small_vocab_file, network=again) == (40, []) and again.batches == []


def test_killed_five_times_the_file_is_that_of_an_undisturbed_run(folder, small_vocab_file, tmp_path_factory):
    """kill -9 at random moments, with sampling and with lines that are torn."""
    command = [sys.executable, "-m", "tests.generation.answering"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole = tmp_path_factory.mktemp("undisturbed")
    (whole / "questions.jsonl").write_bytes((folder / "questions.jsonl").read_bytes())
    vocabulary = str(small_vocab_file)
    subprocess.run([*command, str(whole), vocabulary, "0", "1"], env=environment, check=True, timeout=120, cwd=ROOT)
    path, rng = folder / "answers.jsonl", random.Random(0)

    def lines():
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    for kill in range(5):
        process = subprocess.Popen([*command, str(folder), vocabulary, "0", "1"], env=environment, cwd=ROOT)
        target, deadline = lines() + rng.randint(1, 6), time.monotonic() + 60
        while lines() < target and time.monotonic() < deadline:
            time.sleep(rng.uniform(0, 0.005))
        assert process.poll() is None, "killed before it is done"
        process.send_signal(signal.SIGKILL)
        process.wait()
        if kill % 2:
            with open(path, "ab") as file:
                file.write(b'{"_id": "q1", "content": "\xe5\xa5')
    assert 0 < lines() < 40
    subprocess.run([*command, str(folder), vocabulary, "0", "1"], env=environment, check=True, timeout=120, cwd=ROOT)
    assert path.read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_shards_together_give_the_whole(folder, small_vocab_file):
    run(folder, small_vocab_file)
    whole = (folder / "answers.jsonl").read_bytes()
    (folder / "answers.jsonl").unlink()
    asked = []
    for number in (2, 0, 3, 1):
        network = Echo(Vocabulary(small_vocab_file))
        done, _ = run(folder, small_vocab_file, (number, 4), network)
        asked.append(sum(map(len, network.batches)))
        assert done == sum(asked)
    assert asked == [10, 10, 10, 10]
    assert (folder / "answers.jsonl").read_bytes() == whole


def test_shards_at_the_same_time(folder, small_vocab_file):
    command = [sys.executable, "-m", "tests.generation.answering", str(folder), str(small_vocab_file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # the third does what the first does, at the same time
    processes = [subprocess.Popen([*command, k, "2"], env=environment, cwd=ROOT) for k in ("0", "1", "0")]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(rows(folder)) == 40 and rows(folder)[0]["_id"] == "q0" and rows(folder)[39]["_id"] == "q39"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"options": Options(17)}, "max_new_tokens 16, now 17"),
        ({"options": Options(16, Sampling(temperature=0.5))}, "temperature None, now 0.5"),
        ({"options": Options(16, on_long_prompt="truncate")}, "on_long_prompt 'error', now 'truncate'"),
        ({"model": "other"}, "model 'echo', now 'other'"),
    ],
)
def test_answers_made_otherwise_are_not_mixed(folder, small_vocab_file, change, message):
    run(folder, small_vocab_file)
    before = (folder / "answers.jsonl").read_bytes()
    with pytest.raises(InputError, match=f"answers.jsonl: has answers that were made otherwise .*{message}"):
        run(folder, small_vocab_file, **change)
    assert (folder / "answers.jsonl").read_bytes() == before


def test_answers_to_other_questions_or_of_other_programs_are_not_mixed(folder, small_vocab_file):
    run(folder, small_vocab_file)
    with open(folder / "questions.jsonl", "a") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(InputError, match="input '.*', now '"):
        run(folder, small_vocab_file)
    (folder / "answers.jsonl.options.json").unlink()
    with pytest.raises(InputError, match="without a stamp"):
        run(folder, small_vocab_file)
    (folder / "answers.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(InputError, match="neither _id nor line"):
        run(folder, small_vocab_file)


def test_seeds_depend_on_the_question_alone(folder, small_vocab_file):
    """Not on batches, shards or the order: seeds are part of Echo's answers."""
    options = Options(16, Sampling(temperature=1.0, seed=3))
    run(folder, small_vocab_file, options=options, batch_size=3)
    first = {row.get("_id"): row["content"] for row in rows(folder)}
    (folder / "answers.jsonl").unlink()
    run(folder, small_vocab_file, options=options, batch_size=1)
    assert {row.get("_id"): row["content"] for row in rows(folder)} == first
    assert len({text.split()[1] for text in first.values()}) == 40
    (folder / "answers.jsonl").unlink()
    run(folder, small_vocab_file, options=Options(16, Sampling(temperature=1.0, seed=4)))
    assert {row.get("_id"): row["content"] for row in rows(folder)} != first


def test_long_prompts_are_refused_or_truncated_and_named(folder, small_vocab_file):
    long = json.dumps({"_id": "long", "prompt": "begin " + "middle " * 200 + "end"})
    with open(folder / "questions.jsonl", "a") as file:
        file.write(long + "\n")
    network = Echo(Vocabulary(small_vocab_file))
    with pytest.raises(InputError, match=r"prompt 41: \d+ tokens; 184 fit .*--on_long_prompt truncate"):
        run(folder, small_vocab_file, network=network)
    assert network.batches == [], "before anything is computed"
    done, truncated = run(folder, small_vocab_file, options=Options(16, on_long_prompt="truncate"))
    assert done == 41 and len(truncated) == 1 and truncated[0].endswith("line 41")
    row = rows(folder)[-1]
    assert row["prompt_tokens"] <= 184 < row["truncated_from"]
    assert [row for row in rows(folder) if "truncated_from" in row] == [row]

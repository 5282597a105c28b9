"""`glm32k generate` with the tiny model: batches, chats, sampling, what is printed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.generation.answers import Options, answer_file
from mindformers_glm32k.generation.network import Network
from mindformers_glm32k.generation.questions import QuestionFile
from mindformers_glm32k.generation.sampling import Sampling
from mindformers_glm32k.run_mindformer import read_prediction_config
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from tests.conftest import ROOT

CONFIG = str(ROOT / "research" / "glm32k" / "predict_glm32k_tiny_cpu.yaml")
PROMPTS = [{"_id": number, "prompt": "why? " * (1 + number * 3)} for number in range(6)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def command(tmp_path, small_vocab_file):
    write(tmp_path / "questions.jsonl", PROMPTS)
    return [
        *("generate", "--config", CONFIG, "--tokenizer", str(small_vocab_file), "--max_new_tokens", "6"),
        *("--input", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / "answers.jsonl")),
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights for the YAML."""
    import mindspore
    from mindformers import MindFormerConfig

    from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration

    mindspore.set_seed(1)
    settings = dict(MindFormerConfig(CONFIG).model.model_config)
    settings.pop("type")
    path = tmp_path_factory.mktemp("random") / "random.ckpt"
    mindspore.set_context(device_target="CPU")
    mindspore.save_checkpoint(GLM32KForConditionalGeneration(GLM32KConfig(**settings)), str(path))
    return path


def test_answers_of_a_batch_are_those_of_each_prompt_alone(command, checkpoint, small_vocab_file, tmp_path):
    """Greedy and sampled, by the command and by its parts; MindFormers' messages go to the log."""
    done = subprocess.run(
        [sys.executable, "-m", "mindformers_glm32k", *command, "--batch_size", "3", "--load_checkpoint", checkpoint],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'answers.jsonl'}: 6 of 6 answers\n"
    assert "6 prompts predicted in" in done.stderr and "INFO" not in done.stderr
    assert "INFO" in (tmp_path / "answers.jsonl.log").read_text()
    together = read(tmp_path / "answers.jsonl")
    assert [row["_id"] for row in together] == list(range(6))
    assert all(row["answer_tokens"] <= 6 and "<|" not in row["content"] for row in together)

    config = read_prediction_config(["--config", CONFIG], str(checkpoint), small_vocab_file)
    network, vocabulary = Network(config, 3), Vocabulary(small_vocab_file)
    questions = QuestionFile(tmp_path / "questions.jsonl")

    def answers(batch_size, **settings):
        network.batch_size = batch_size
        path = tmp_path / f"{batch_size}-{settings}.jsonl"
        answer_file(questions, network, vocabulary, Options(6, Sampling(**settings)), path, settings)
        return read(path)

    assert answers(3) == answers(1) == together
    sampled = answers(3, temperature=2.0, top_k=50)
    assert sampled == answers(1, temperature=2.0, top_k=50)
    assert [row["content"] for row in sampled] != [row["content"] for row in together]
    assert sampled != answers(1, temperature=2.0, top_k=50, seed=1)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--shard", "4/4"], "--shard 4/4: K/N is needed"),
        (["--batch_size", "0"], "--batch_size: 0 is not a whole number"),
        (["--max_new_tokens", "256"], "--max_new_tokens 256: seq_length 256 has no room"),
        (["--top_p", "2"], "--top_p 2.0: must be"),
        (["--max_new_tokens", "200"], "prompt 6: "),
        (["--temprature", "1"], "unknown option --temprature, did you mean '--temperature'?"),
        (["--input", "none.jsonl"], "--input none.jsonl: no such file"),
    ],
)
def test_wrong_options_are_named_before_anything_is_built(command, tmp_path, capfd, change, message):
    assert cli.main([*command, *change]) == 2
    error = capfd.readouterr().err
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "answers.jsonl").exists() or not (tmp_path / "answers.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_five_times_with_the_model(command, checkpoint, tmp_path):
    """kill -9 of the command at five random moments: the file is that of an undisturbed run."""
    rows = [{"_id": number, "prompt": f"{number} why? " * (1 + number % 7)} for number in range(60)]
    write(tmp_path / "questions.jsonl", rows)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = [
        sys.executable,
        "-m",
        "mindformers_glm32k",
        *command,
        "--load_checkpoint",
        str(checkpoint),
        "--batch_size",
        "2",
    ]
    whole = [*start, "--output", str(tmp_path / "whole.jsonl")]
    subprocess.run(whole, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)
    path, rng = tmp_path / "answers.jsonl", random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = path.read_bytes().count(b"\n") if path.is_file() else 0
        target, deadline = before + rng.randint(1, 9), time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if path.is_file() and path.read_bytes().count(b"\n") >= target:
                break
            time.sleep(rng.uniform(0, 0.01))
        assert process.poll() is None, "killed before it is done"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(start, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

"""This plugin's generator as the engine: batches, stop ids, least lengths, and what a stamp says of the model."""

import json

import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.longbench.engines import LocalEngine, Request
from mindformers_glm32k.longbench.predictions import read_predictions
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from tests.conftest import ROOT

CONFIG = str(ROOT / "research" / "glm32k" / "predict_glm32k_tiny_cpu.yaml")


def request(name, ids, least=0, stop_ids=(2,), most=4):
    return Request(("hotpotqa", name), ids, "", True, most, least, stop_ids)


@pytest.fixture(scope="module")
def engine(small_vocab_file, tmp_path_factory):
    arguments = ["--config", CONFIG, "--output_dir", str(tmp_path_factory.mktemp("output"))]
    return LocalEngine(arguments, None, str(small_vocab_file), Vocabulary(small_vocab_file), batch_size=3)


def test_a_batch_gives_each_prompt_what_it_gets_alone(engine):
    prompts = [[5, 6, 7], list(range(20, 60)), [9]]
    together = engine.generate(prompts, 6, (2,))
    assert [len(answer) for answer in together] == [6, 6, 6], "random weights end nowhere"
    assert [engine.generate([prompt], 6, (2,))[0] for prompt in prompts] == together
    assert engine.generate(prompts[:2], 6, (2,)) == together[:2], "a batch that is not full"


def test_answers_end_at_stop_ids_but_not_before_their_least_length(engine):
    prompt = [5, 6, 7]
    free = engine.generate([prompt], 6, (2,))[0]
    assert engine.generate([prompt], 6, (free[0],))[0] == free[:1], "the stop id included, as transformers has it"
    late = engine.generate([prompt], 6, (2, free[0]), min_new_tokens=1)[0]
    assert late[0] != free[0] and len(late) >= 1


def test_requests_are_answered_under_their_keys(engine):
    requests = [request(str(number), [5 + number, 6]) for number in range(5)]
    requests += [request("samsum", [5, 6], least=1), request("last", [8], most=2)]
    answers = list(engine.answer(requests))
    assert [key for key, _ in answers] == [found.key for found in requests]
    vocabulary = engine._vocabulary
    alone = vocabulary.decode(engine.generate([[8]], 2, (2,))[0], skip_special_tokens=True)
    assert answers[-1][1] == alone


def test_the_command_predicts_with_the_plugin(small_vocab_file, tmp_path):
    rows = [{"content": "a b c d " * 20, "summary": "x", "dataset": "mine", "_id": number} for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["longbench", "predict", "--config", CONFIG, "--data", str(tmp_path / "rows.jsonl")]
    command += ["--tokenizer", str(small_vocab_file), "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "3"]
    assert cli.main(command) == 0
    found, _, _ = read_predictions(tmp_path / "out" / "mine.jsonl")
    stamp = found[0]["stamp"]
    assert [row["_id"] for row in found] == ["0", "1"]
    assert (stamp["engine"], stamp["model"]) == ("mindformers", "random weights, seed 0")
    assert stamp["differs"] == [f"prompts are truncated to {stamp['max_length']} tokens instead of 31500"]
    assert stamp["max_length"] < 256, "what fits into the tiny model"
    assert cli.main([*command, "--max_length", "300"]) == 2

"""Who answers: this plugin's generator, with batches, stop ids and what a stamp says of the model; or a server."""

import json
import time

import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.longbench import engines
from mindformers_glm32k.longbench.engines import EndpointEngine, LocalEngine, Request
from mindformers_glm32k.longbench.predictions import read_predictions
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from tests.conftest import ROOT
from tests.longbench.server import serving

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


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(engines, "_FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def numbered(number=0, chat=True, least=0):
    return Request(("hotpotqa", str(number)), [1, 2, number], f"text {number}", chat, 32, least, (2, 13))


def test_ids_go_with_the_protocol_of_pred_py():
    with serving() as (url, server):
        engine = EndpointEngine(url + "/")
        assert list(engine.answer([numbered(7, least=1)])) == [(("hotpotqa", "7"), "Oslo")]
    assert server.bodies == [
        {
            "path": "/v1/completions",
            "key": None,
            "model": "served-model",
            "prompt": [1, 2, 7],
            "max_tokens": 32,
            "temperature": 0.0,
            "stop_token_ids": [2, 13],
            "skip_special_tokens": True,
            "return_token_ids": True,
            "min_tokens": 1,
        }
    ]
    assert engine.identity == {"engine": "endpoint", "model": "served-model", "send": "ids", "standard": False}


def test_ids_that_come_back_are_decoded_as_pred_py_decodes(small_vocab_file):
    """The server's text has the space that the chat format puts there, and another count of broken characters."""
    vocabulary = Vocabulary(small_vocab_file)
    ids = [*vocabulary.encode("a b"), vocabulary.eos_id]
    with serving(reply=lambda body: " a b", token_ids=ids) as (url, _):
        for settings, expected in (
            ({"vocabulary": vocabulary}, "a b"),
            ({}, " a b"),
            ({"vocabulary": vocabulary, "send": "text"}, " a b"),
            ({"vocabulary": vocabulary, "standard": True}, " a b"),
        ):
            assert list(EndpointEngine(url, **settings).answer([numbered(7)])) == [(("hotpotqa", "7"), expected)], (
                settings
            )


def test_texts_go_to_the_chat_and_raw_ones_to_completions(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with serving() as (url, server):
        engine = EndpointEngine(url, model="mine", send="text", standard=True)
        answers = list(engine.answer([numbered(1), numbered(2, chat=False, least=1)]))
    assert sorted(answers) == [(("hotpotqa", "1"), "Oslo"), (("hotpotqa", "2"), "Oslo")]
    chat, raw = sorted(server.bodies, key=lambda body: body["path"])
    assert chat["messages"] == [{"role": "user", "content": "text 1"}] and "prompt" not in chat and "stop" not in chat
    assert raw["prompt"] == "text 2" and raw["stop"] == ["\n"]
    assert not {"stop_token_ids", "min_tokens", "skip_special_tokens", "return_token_ids"} & {*chat, *raw}, (
        "OpenAI's interface alone"
    )
    assert chat["key"] == "Bearer a-key"
    assert len(engine.differs) == 3, "what differs from pred.py is named"


def test_every_request_is_answered_once_whatever_fails():
    faults = ["drop", 429, 500, "half", "junk", 503, "drop", "hang"] * 3
    with serving(reply=lambda body: str(body["prompt"][-1]), faults=faults) as (url, server):
        engine = EndpointEngine(url, timeout=0.5, concurrency=6, retries=20)
        answers = dict(engine.answer(map(numbered, range(40))))
    assert answers == {("hotpotqa", str(number)): str(number) for number in range(40)}
    assert server.hits == 40 + len(faults) and len(server.bodies) == 40


def test_as_many_requests_at_a_time_as_asked_for():
    with serving(delay=0.1) as (url, server):
        begun = time.monotonic()
        assert len(list(EndpointEngine(url, concurrency=10).answer(map(numbered, range(40))))) == 40
    assert 0.4 <= time.monotonic() - begun < 3.0, "one after the other takes 4 s"


def test_requests_are_prepared_as_they_are_sent():
    prepared = []

    def requests():
        for number in range(100):
            prepared.append(number)
            yield numbered(number)

    with serving() as (url, _):
        first = next(EndpointEngine(url, concurrency=2).answer(requests()))
    assert first and len(prepared) <= 10


def test_answers_that_are_there_are_not_lost_to_one_that_fails():
    with serving(faults=[None] * 5 + [400], delay=0.05) as (url, _):
        answers = []
        with pytest.raises(InputError, match="HTTP 400"):
            for answer in EndpointEngine(url, concurrency=1).answer(map(numbered, range(20))):
                answers.append(answer)
    assert len(answers) == 5


def test_an_engine_answers_again():
    with serving() as (url, _):
        engine = EndpointEngine(url)
        assert [len(list(engine.answer(map(numbered, range(3))))) for _ in range(2)] == [3, 3]


def test_retry_after_is_obeyed():
    with serving(faults=[429], headers=[("Retry-After", "0.4")]) as (url, _):
        begun = time.monotonic()
        assert len(list(EndpointEngine(url).answer([numbered()]))) == 1
    assert time.monotonic() - begun >= 0.4


def test_a_server_that_stays_away_ends_the_run_in_one_line():
    with serving(faults=[500] * 50) as (url, server):
        with pytest.raises(CommandFailed, match=r"/completions: HTTP 500: .*fault 500.*after 3 attempts"):
            list(EndpointEngine(url, retries=2, concurrency=1).answer([numbered()]))
        assert server.hits == 3
    with pytest.raises(CommandFailed, match=r"/models: URLError.*after 2 attempts"):
        EndpointEngine(url, retries=1)


@pytest.mark.parametrize(
    "status, hint", [(400, "--send text"), (401, "OPENAI_API_KEY"), (404, "with /v1"), (422, "--standard")]
)
def test_refusals_are_not_repeated(status, hint):
    with serving(faults=[status]) as (url, server):
        with pytest.raises(InputError, match=f"HTTP {status}: .*fault.*{hint}"):
            list(EndpointEngine(url).answer([numbered()]))
        assert server.hits == 1


def test_urls_and_odd_answers(monkeypatch):
    with pytest.raises(InputError, match="--base_url localhost:8000: a URL such as"):
        EndpointEngine("localhost:8000")
    with serving() as (url, _):
        engine = EndpointEngine(url)
        monkeypatch.setattr(engine, "_call", lambda *_: {"choices": []})
        with pytest.raises(CommandFailed, match="no completion in the answer"):
            list(engine.answer([numbered()]))
        monkeypatch.setattr(EndpointEngine, "_call", lambda *_: {"data": []})
        with pytest.raises(InputError, match="lists no model; give --model"):
            EndpointEngine(url)

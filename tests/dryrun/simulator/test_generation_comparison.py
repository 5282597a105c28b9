"""Tokens and logits of all ranks beside one device's: what counts as equal, and what is said when something is not."""

from types import SimpleNamespace

import numpy as np
import pytest

from mindformers_glm32k.dryrun.simulator.comparison import GenerationRun, compare_generation
from mindformers_glm32k.dryrun.simulator.report import summary, write_reports

ALLOWED = 1e-5
HEADER = {
    "world_size": 2,
    "layout": "mp 2",
    "config": "predict.yaml",
    "shrunk": {"seq_length": [32768, 64]},
    "precision": "float32",
    "precision_text": "float32",
    "prompts": [[1], [2]],
    "prompt_lengths": [1, 1],
    "prompts_text": "random tokens",
    "weights": "random",
    "compile_seconds": 1.0,
    "execution_seconds": 0.1,
    "execution_seconds_one_device": 0.1,
}


def interpreter(rank, **op_counts):
    return SimpleNamespace(rank=rank, op_counts=op_counts, non_finite=[])


def generated(*logits, unread=()):
    """What ranks give whose logits (N, B, V) are these."""
    logits = [np.asarray(item, np.float32) for item in logits]
    interpreters = [
        {"prefill": interpreter(rank, AllReduce=2, MatMul=5), "increment": interpreter(rank, AllGather=3)}
        for rank in range(len(logits))
    ]
    return GenerationRun(interpreters, [item.argmax(-1).T.astype(np.int32) for item in logits], logits, list(unread))


@pytest.fixture
def logits():
    """Three tokens of two prompts, ten words."""
    return np.random.default_rng(0).standard_normal((3, 2, 10)).astype(np.float32)


def changed(logits, place, value):
    result = logits.copy()
    result[place] = value
    return result


def test_equal_ranks_agree(logits):
    report = compare_generation(generated(logits, logits), generated(logits), ALLOWED)
    assert report["agrees"] and report["largest_logit_difference"] == 0
    assert report["tokens"] == report["tokens_one_device"] == logits.argmax(-1).T.tolist()
    assert report["largest_logit"] == pytest.approx(np.abs(logits).max())
    assert report["collectives"] == [
        {"kind": kind, "rank": rank, "phase": phase, "count": count}
        for kind, phase, count in (("AllGather", "increment", 3), ("AllReduce", "prefill", 2))
        for rank in (0, 1)
    ]


def test_a_difference_in_logits_is_said_with_its_token(logits):
    ours = changed(logits, (1, 0, 3), logits[1, 0, 3] - 1e-3)
    report = compare_generation(generated(ours, ours), generated(logits), ALLOWED)
    assert [problem.split(":")[0] for problem in report["problems"]] == ["token 2"]
    assert report["largest_logit_difference"] == pytest.approx(1e-3, rel=1e-3)
    assert compare_generation(generated(ours, ours), generated(logits), 1e-2)["agrees"]


def test_behind_another_token_logits_are_not_compared(logits):
    ours = changed(logits, (0, 1, 4), 50.0)
    ours[1:, 1] += 7
    report = compare_generation(generated(ours), generated(logits), ALLOWED)
    assert len(report["problems"]) == 2 and all(problem.startswith("token 1") for problem in report["problems"])
    assert f"of prompt 1 is 4, on one device {logits[0, 1].argmax()}" in report["problems"][1]


def test_a_near_tie_may_fall_either_way(logits):
    best = logits[2, 0].argmax()
    other = (best + 1) % 10
    theirs = changed(logits, (2, 0, other), logits[2, 0, best] - 1e-6)
    ours = changed(logits, (2, 0, other), logits[2, 0, best] + 1e-6)
    report = compare_generation(generated(ours), generated(theirs), ALLOWED)
    assert report["agrees"] and report["near_ties"][0].startswith("token 3 of prompt 0")
    assert not compare_generation(generated(ours), generated(theirs), 1e-8)["agrees"]


@pytest.mark.parametrize(
    "value, words",
    [
        (99.0, "rank 1 chooses 5 as token 2 of prompt 0, rank 0 "),
        (None, "ranks 0 and 1 should hold equal logits, they differ by 0.25"),
        (np.nan, "rank 1 chooses 5"),
    ],
)
def test_ranks_that_differ_are_caught(logits, value, words):
    other = changed(logits, (1, 0, 5), logits[1, 0].min() if value is None else value)
    base = changed(other, (1, 0, 5), logits[1, 0].min() - 0.25) if value is None else logits
    report = compare_generation(generated(base, other), generated(base), ALLOWED)
    assert len(report["problems"]) == 1 and report["problems"][0].startswith(words)


def test_what_is_not_finite_differs(logits):
    ours = changed(logits, (0, 0), np.nan)
    report = compare_generation(generated(ours), generated(logits), ALLOWED)
    assert not report["agrees"] and report["steps"][0]["logit_difference"] == np.inf


def test_messages_left_behind_are_said(logits):
    report = compare_generation(generated(logits, unread=["rank 0 to rank 1 (tag 3): 1"]), generated(logits), ALLOWED)
    assert report["problems"] == ["a message that nobody receives: rank 0 to rank 1 (tag 3): 1"]


def test_both_reports_say_what_differs(logits, tmp_path):
    ours = changed(logits, (1, 0, 3), 50.0)
    report = {**HEADER, **compare_generation(generated(ours, ours), generated(logits), ALLOWED)}
    write_reports(report, tmp_path)
    assert "**They differ.**" in (tmp_path / "execution.md").read_text()
    lines = summary(report).splitlines()
    assert "mp 2 on 2 NPUs" in lines[0] and f"3 (one device {logits[1, 0].argmax()})" in lines[3]
    assert lines[-1] == "2 disagreements"

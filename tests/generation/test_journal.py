"""Progress and time left of a run."""

from mindformers_glm32k.generation import journal


def test_progress_says_how_long_it_takes(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    progress = journal.Progress(10, 110)
    now[0] = 120.0
    progress.step("trec")
    now[0] = 140.0
    progress.step("trec")
    assert capsys.readouterr().err.splitlines() == [
        "10 of 110 samples are there",
        "12 of 110 samples, trec: 20.00 s each, 32 min 40 s left",
    ]


def test_answers_that_cost_more_count_for_more(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    progress = journal.Progress(0, 3, "prompts", work=100)
    now[0] = 80.0
    progress.step(work=80)
    now[0] = 100.0
    progress.end()
    assert capsys.readouterr().err.splitlines() == [
        "1 of 3 prompts: 80.00 s each, 20 s left",
        "1 prompts predicted in 1 min 40 s",
    ]

"""Counting cuts over threads and processes."""

import multiprocessing
import pickle
import random

from mindformers_glm32k.data.stats import WORST, CutCounter, CutReport


class Log:
    def __init__(self):
        self.lines = []

    def warning(self, text, *values):
        self.lines.append(text % values)


def place(sample):
    return f"a.jsonl, line {sample + 1}"


def test_the_first_cut_is_told_at_once_and_each_epoch_is_summed_up():
    log = Log()
    cuts = CutCounter(place, 4, log, "left")
    for sample, lengths in enumerate([(15, 15), (32, 15), (20, 0), (8, 8)]):
        cuts.add(sample, *lengths)
    first, summary = log.lines
    assert (
        first == "a.jsonl, line 2: cut from 32 to 15 tokens to fit the row (truncation: left); "
        "a summary follows after each epoch"
    )
    assert summary == (
        "of 4 rows 1 were cut (truncation: left) and 1 left out, 37 of 75 tokens (49.3 %); most lost, "
        "in tokens: a.jsonl, line 3: 20, left out; a.jsonl, line 2: 32 to 15"
    )
    for sample in range(4):
        cuts.add(sample, 11, 10)
    assert len(log.lines) == 3 and "of 4 rows 4 were cut" in log.lines[2]


def test_a_row_that_comes_twice_is_named_once():
    report = CutReport()
    for sample in (3, 1, 3, 3):
        report.add(sample, 10 + sample, 10)
    assert report.worst == [(13, 10, 3), (11, 10, 1)] and report.cut == 4


def test_nothing_is_said_where_nothing_is_cut():
    log = Log()
    cuts = CutCounter(place, 2, log)
    for sample in range(6):
        cuts.add(sample, 10, 10)
    assert log.lines == []


def test_forked_workers_count_together():
    log = Log()
    cuts = CutCounter(place, 9, log)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=cuts.add, args=(number, 20 + number, 10)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    cuts.add(100, 1, 1)
    assert len(log.lines) == 1, "the warning of the first cut was another process's"
    assert "of 9 rows 8 were cut" in log.lines[0] and "a.jsonl, line 8: 27 to 10" in log.lines[0]


def test_reports_of_parts_make_the_report_of_the_whole():
    rng = random.Random(0)
    whole, parts = CutReport(), [CutReport() for _ in range(3)]
    for sample in range(200):
        before = rng.randint(5, 50)
        after = rng.choice([before, 0, 5])
        assert whole.add(sample, before, after) == (after != before)
        parts[sample % 3].add(sample, before, after)
    merged = CutReport()
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert vars(merged) == vars(whole) and len(whole.worst) == WORST
    assert [before - after for before, after, _ in whole.worst] == sorted(
        [before - after for before, after, _ in whole.worst], reverse=True
    )

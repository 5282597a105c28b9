"""Counting cuts over threads and processes."""
import multiprocessing

from mindformers_glm32k.data.cuts import CutCounter


class Log:
    def __init__(self):
        self.lines = []

    def warning(self, text, *values):
        self.lines.append(text % values)


def counter(log, rows_per_epoch):
    return CutCounter(lambda sample: f"a.jsonl, line {sample + 1}", 10, 5, rows_per_epoch, log)


def test_the_first_cut_is_told_at_once_and_each_epoch_is_summed_up():
    log = Log()
    cuts = counter(log, 4)
    for sample, lengths in enumerate([(10, 5), (30, 2), (11, 9), (4, 4)]):
        cuts.add(sample, *lengths)
    first, summary = log.lines
    assert "a.jsonl, line 2: cut to fit the row (prompt 10 of 30 tokens, answer 2 of 2)" in first
    assert "of 4 rows 2 had their prompt cut to max_source_length=10 tokens and 1 their answer" in summary
    assert "the longest prompt has 30 tokens: a.jsonl, line 2" in summary
    for sample in range(4):
        cuts.add(sample, 11, 1)
    assert len(log.lines) == 3 and "of 4 rows 4 had their prompt" in log.lines[2]


def test_nothing_is_said_where_nothing_is_cut():
    log = Log()
    cuts = counter(log, 2)
    for sample in range(6):
        cuts.add(sample, 10, 5)
    assert log.lines == []


def test_forked_workers_count_together():
    log = Log()
    cuts = counter(log, 9)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=cuts.add, args=(number, 20 + number, 1)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    cuts.add(100, 1, 1)
    assert len(log.lines) == 1, "the warning of the first cut was another process's"
    assert "of 9 rows 8 had their prompt cut" in log.lines[0] and "27 tokens: a.jsonl, line 8" in log.lines[0]

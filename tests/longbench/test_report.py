"""The report: means as in the leaderboard, differences beyond chance or not, and both pages."""

import html.parser
import random

import numpy as np
import pytest

from mindformers_glm32k.data.longbench import TEST_SETS
from mindformers_glm32k.longbench import summary, write_report
from mindformers_glm32k.longbench.report import build
from mindformers_glm32k.longbench.score import score_folder
from tests.longbench.test_score import prediction, write


def make_run(folder, share, datasets=("hotpotqa", "multifieldqa_zh", "passage_retrieval_en"), rows=60, seed=0):
    rng = random.Random(seed)
    for dataset in datasets:
        right = "Paragraph 3" if "retrieval" in dataset else "奥斯陆" if dataset.endswith("zh") else "Oslo"
        write(
            folder,
            dataset,
            [
                prediction(
                    right if rng.random() < share else "<b>no</b> & no",
                    [right],
                    length=rng.randint(500, 20000),
                    _id=f"{index}",
                    dataset=dataset,
                    language="zh" if dataset.endswith("zh") else "en",
                    input="哪个城市？" if dataset.endswith("zh") else "Which | one?",
                    answer_depth=rng.random(),
                )
                for index in range(rows)
            ],
        )
    return score_folder(folder)


def test_published_scores_are_whole_and_have_the_published_means():
    scores = summary.published()["scores"]
    assert set(scores) == TEST_SETS
    means = {mean.title: mean.groups for mean in summary.means(list(scores))}
    assert round(summary.published_mean(means["all, English"]), 1) == 48.5
    assert round(summary.published_mean(means["all, Chinese"]), 1) == 52.8
    assert round(summary.published_mean(means["few-shot, English"]), 1) == 68.1
    assert round(summary.published_mean(means["code"]), 1) == 56.2


def test_means_that_lack_data_sets_say_so():
    titles = [mean.title for mean in summary.means(["hotpotqa", "musique", "lcc"])]
    assert titles == ["multi-document QA, English (2 of 3)", "code (1 of 2)", "all, English (3 of 16)"]
    assert [mean.title for mean in summary.means(["lcc_e", "repobench-p_e"])] == ["code"]


def test_differences_of_pairs(tmp_path):
    good, bad = make_run(tmp_path / "good", 0.9), make_run(tmp_path / "bad", 0.4, seed=1)
    found = summary.difference(good, bad, [["hotpotqa"]])
    assert found.paired and found.beyond and found.interval[0] < found.value < found.interval[1]
    expected = 100 * (good.datasets["hotpotqa"].scores - bad.datasets["hotpotqa"].scores).mean()
    assert found.value == pytest.approx(expected, abs=0.01)
    same = summary.difference(good, good, [["hotpotqa"]])
    assert (same.value, same.interval, same.beyond) == (0.0, [0.0, 0.0], False) or same.interval == (0.0, 0.0)
    assert summary.difference(good, make_run(tmp_path / "few", 1, ["hotpotqa"]), [["musique"]]) is None


def test_a_small_difference_is_not_beyond_chance(tmp_path):
    one, two = make_run(tmp_path / "one", 0.6), make_run(tmp_path / "two", 0.6, seed=1)
    assert not summary.difference(one, two, [["hotpotqa"]]).beyond


@pytest.mark.parametrize(
    "lengths, bins",
    [
        ([100, 101, 140], [(100, 108), (108, 116), (116, 124), (124, 132), (132, 141)]),
        ([500, 30000], [(0, 2048), (2048, 4096), (4096, 8192), (8192, 16384), (16384, 32768)]),
        ([7], [(7, 8)]),
        ([185, 189], [(185, 190)]),
        ([0, 3], [(0, 2), (2, 4)]),
    ],
)
def test_bins_hold_all_lengths(lengths, bins):
    assert summary.length_bins(lengths) == bins


def test_the_map_holds_every_row_with_a_depth(tmp_path):
    run = make_run(tmp_path / "a", 0.5)
    bins = summary.length_bins(run.datasets["passage_retrieval_en"].lengths)
    cells = [cell for row in summary.retrieval_map(run, bins) for cell in row if cell]
    assert sum(cell.rows for cell in cells) == 60, "of passage_retrieval_en alone"
    total = sum(cell.rows * cell.score for cell in cells) / 60
    assert total == pytest.approx(run.datasets["passage_retrieval_en"].score, abs=0.2)


def test_worst_answers_are_at_most_ten_and_never_right_ones(tmp_path):
    run = make_run(tmp_path / "a", 0.5)
    worst = summary.worst(run.datasets["hotpotqa"])
    assert len(worst) == 10 and all(score < 1 for _, score in worst)
    assert [row["length"] for row, _ in worst] == sorted((row["length"] for row, _ in worst), reverse=True)
    assert summary.worst(make_run(tmp_path / "b", 1.0).datasets["hotpotqa"]) == []


class Page(html.parser.HTMLParser):
    """Collects tags, text and what the page would load; raises on tags that do not close."""

    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.loads, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_both_pages(tmp_path):
    runs = {
        "fine-tuned": make_run(tmp_path / "good", 0.9),
        "base": make_run(tmp_path / "bad", 0.3, seed=1),
        "third": make_run(tmp_path / "third", 0.5, ["hotpotqa"], seed=2),
    }
    page, text = (path.read_text(encoding="utf-8") for path in write_report(runs, tmp_path / "out"))
    parsed = Page(page)
    assert not parsed.loads and "script" not in parsed.tags and "url(" not in page, "self-contained"
    assert "b" not in parsed.tags[parsed.tags.index("ol") :] or "<b>no</b>" not in page, "predictions are escaped"
    for content in (" ".join(parsed.text), text):
        for wanted in ("fine-tuned", "base", "third", "hotpotqa", "multifieldqa", "published", "哪个城市？", "奥斯陆"):
            assert wanted in content, wanted
        assert "54.40" in content, "hotpotqa as published"
        assert "beyond what chance gives" in content
        assert "Retrieval by length and depth: base" in content
    assert page.count('class="bar"') >= 7, "intervals of each run"
    assert "Which \\| one?" in text, "bars do not break tables"


def test_numbers_of_the_report_are_those_of_the_scores(tmp_path):
    runs = {"one": make_run(tmp_path / "one", 0.7), "two": make_run(tmp_path / "two", 0.2, seed=3)}
    table = build(runs).sections[0].blocks[0]
    by_name = {row[0]: row for row in table.rows}
    for name in runs["one"].datasets:
        row, head = by_name[name], table.head
        assert row[head.index("score")] == f"{runs['one'].datasets[name].score:.2f}"
        assert row[head.index("two")] == f"{runs['two'].datasets[name].score:.2f}"
        assert row[-1].endswith(" *")
    overall = summary.mean(runs["one"], [["hotpotqa"], ["passage_retrieval_en"]])
    scores = [runs["one"].datasets[name].score for name in ("hotpotqa", "passage_retrieval_en")]
    assert overall.score == pytest.approx(np.mean(scores), abs=0.01)
    assert overall.interval[0] < overall.score < overall.interval[1]


def test_a_run_of_one_folder_has_no_comparison(tmp_path):
    report = build({"alone": make_run(tmp_path / "a", 0.5)})
    assert report.runs == ["alone"] and not any("against" in line for line in report.lead)

"""Metrics against LongBench's own, row by row, and their quirks one by one."""

import json
import random
import warnings

import pytest

from mindformers_glm32k.data.longbench import TEST_SETS
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench import metrics


def test_every_golden_row(reference):
    rows = json.loads((reference / "longbench" / "golden_metrics.json").read_text(encoding="utf-8"))["rows"]
    assert {row["dataset"] for row in rows} == TEST_SETS and len(rows) == 168
    for row in rows:
        assert round(100 * metrics.score_row(row["dataset"], row, row["all_classes"]), 2) == row["score"], row


def test_every_data_set_has_a_metric():
    assert set(metrics.METRICS) == TEST_SETS | {"kv_retrieval"}
    assert metrics.metric_of("trec_e") is metrics.classification
    assert metrics.metric_of("mine") is metrics.qa_f1 and metrics.metric_of("mine", "zh") is metrics.qa_f1_zh


def test_words_are_those_of_squad():
    assert metrics.words("The cat's  an-other; A  DOG, the end.") == ["cats", "another", "dog", "end"]
    assert metrics.chinese_words("我来到北京，清华大学 ABC。") == ["我", "来到", "北京", "清华大学", "abc"]


def test_f1_counts_each_word_as_often_as_both_have_it():
    assert metrics.qa_f1("b b c", "b b b d") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert metrics.qa_f1("", "a word") == metrics.qa_f1("the", "the") == 0.0


def test_classification_passes_over_the_name_behind_one_it_removes():
    classes = ["Food", "Food and", "Food and drink"]
    # "Food" is removed while the list is iterated, so that "Food and" stays and halves the score
    assert metrics.classification("Food and drink", "Food and drink", classes) == 0.5
    assert metrics.classification("Food", "Food and drink", classes) == 0.0
    with pytest.raises(InputError, match="all_classes"):
        metrics.classification("Food", "Food", None)


def test_numbers_count_by_their_share():
    assert metrics.count("5, or perhaps 6 or 5", "5") == pytest.approx(2 / 3)
    assert metrics.count("05", "5") == 0.0
    assert metrics.retrieval("Paragraph 12 and 3", "Paragraph 12") == 0.5
    assert metrics.retrieval_zh("段落3", "段落3") == 1.0
    with pytest.raises(InputError, match="names no paragraph"):
        metrics.retrieval("3", "the third")


def test_code_is_compared_by_its_first_line_that_is_no_comment():
    assert metrics.code_similarity("\n\n```python\n# one\nreturn x\ny", "return x") == 1.0
    assert metrics.code_similarity("# only a comment", "x") == 0.0
    assert metrics.code_similarity("", "") == 1.0, "as fuzzywuzzy has it of two equal texts"


def test_code_similarity_is_the_ratio_of_fuzzywuzzy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses python-Levenshtein, which would give other ratios
        fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    if fuzz.SequenceMatcher.__module__ != "difflib":
        pytest.skip("python-Levenshtein is installed, with which fuzzywuzzy gives other ratios")
    rng = random.Random(0)
    for _ in range(300):
        one, two = ("".join(rng.choices("abc (=", k=rng.randint(0, 300))) for _ in range(2))
        assert metrics.code_similarity(one, two) == fuzz.ratio(one, two) / 100


def test_few_shot_answers_end_at_their_first_line():
    row = {"pred": "\n\nParis\nQuestion: and then?", "answers": ["London", "Paris"]}
    assert metrics.score_row("triviaqa", row, None) == 1.0
    assert metrics.score_row("hotpotqa", row, None) < 1.0


def test_rouge_is_zero_where_the_library_gives_up():
    assert metrics.rouge_l("", "a text") == metrics.rouge_l("a text", "") == metrics.rouge_l(" . ", "..") == 0.0


def test_the_retrieval_task_of_make_data_wants_the_whole_answer():
    row = {"pred": " The city is Oslo. ", "answers": ["The city is Oslo."]}
    assert metrics.score_row("kv_retrieval", row, None) == 1.0
    assert metrics.score_row("kv_retrieval", {**row, "pred": "The city is Paris."}, None) == 0.0


@pytest.mark.parametrize("package, call", [("rouge", metrics._rouge), ("jieba", metrics._segmenter)])
def test_a_missing_library_is_named_with_the_extra(monkeypatch, package, call):
    call.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(InputError, match=rf"package {package} is needed.*pip install .*\[longbench\]"):
        call()
    call.cache_clear()

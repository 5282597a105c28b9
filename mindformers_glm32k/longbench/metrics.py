"""The metrics of LongBench's metrics.py, from 0 to 1, its quirks included.

Two quirks come from libraries. `rouge` recurses once a token of the longest common subsequence, so that two long texts
without a full stop (Chinese ones) end in a RecursionError, which LongBench counts as 0. `fuzzywuzzy.fuzz.ratio` is
difflib's ratio unless python-Levenshtein, which LongBench does not ask for, is installed; here it is always difflib's.
"""

from __future__ import annotations

import difflib
import functools
import re
import string
from collections import Counter
from typing import Callable

from mindformers_glm32k.data.longbench import plain_name
from mindformers_glm32k.errors import InputError

EXTRA = "pip install 'mindformers-glm32k[longbench]'"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》"
    + "「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.",
)


def words(text: str) -> list[str]:
    """English words in lower case, without punctuation and articles."""
    text = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def chinese_words(text: str) -> list[str]:
    """Words as jieba finds them, in lower case, without punctuation and blank space."""
    found = ("".join(word.lower().translate(_CHINESE_PUNCTUATION).split()) for word in _segmenter()(text))
    return [word for word in found if word]


def _f1(predicted: list[str], wanted: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str, _classes: list | None = None) -> float:
    """F1 of the bags of English words."""
    return _f1(words(prediction), words(answer))


def qa_f1_zh(prediction: str, answer: str, _classes: list | None = None) -> float:
    """F1 of the bags of Chinese words."""
    return _f1(chinese_words(prediction), chinese_words(answer))


def rouge_l(prediction: str, answer: str, _classes: list | None = None) -> float:
    """F of ROUGE-L (rouge 1.0.1, summary level); 0 where either side is empty or too long for the library."""
    try:
        return _rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except Exception:  # empty texts, too deep a recursion: LongBench counts whatever goes wrong as 0
        return 0.0


def rouge_l_zh(prediction: str, answer: str, _classes: list | None = None) -> float:
    """ROUGE-L of texts that jieba has segmented."""
    segment = _segmenter()
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(answer)))


def classification(prediction: str, answer: str, classes: list | None) -> float:
    """1 over the number of class names in the prediction, if the right one is among them.

    Names that are part of the right one do not count; as in LongBench the list shrinks while it is iterated, so that
    the name after each removed one is skipped.
    """
    if not classes:
        raise InputError("field 'all_classes' is empty; LongBench's classification needs the names of the classes")
    found = [name for name in classes if name in prediction]
    for name in found:
        if name in answer and name != answer:
            found.remove(name)  # noqa: B909 - LongBench's quirk
    return 1.0 / len(found) if answer in found else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def count(prediction: str, answer: str, _classes: list | None = None) -> float:
    """The share of the right number among all numbers of the prediction."""
    return _share_of_numbers(prediction, str(answer))


def _retrieval(label: str, prediction: str, answer: str, _classes: list | None = None) -> float:
    place = re.search(label + r"(\d+)", answer)
    if not place:
        raise InputError(f"the answer {answer!r:.60} names no paragraph; it is needed as '{label}12'")
    return _share_of_numbers(prediction, place[1])


retrieval = functools.partial(_retrieval, "Paragraph ")
retrieval_zh = functools.partial(_retrieval, "段落")


def code_similarity(prediction: str, answer: str, _classes: list | None = None) -> float:
    """difflib's ratio, in whole percents, of the first line that is neither a comment nor a code fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == answer:  # two empty texts, too
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def exact_match(prediction: str, answer: str, _classes: list | None = None) -> float:
    """1 where the texts agree, blank space at their ends apart. Not a metric of LongBench."""
    return float(prediction.strip() == answer.strip())


METRICS: dict[str, Callable[[str, str, list | None], float]] = {
    "narrativeqa": qa_f1,
    "qasper": qa_f1,
    "multifieldqa_en": qa_f1,
    "multifieldqa_zh": qa_f1_zh,
    "hotpotqa": qa_f1,
    "2wikimqa": qa_f1,
    "musique": qa_f1,
    "dureader": rouge_l_zh,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "vcsum": rouge_l_zh,
    "trec": classification,
    "triviaqa": qa_f1,
    "samsum": rouge_l,
    "lsht": classification,
    "passage_retrieval_en": retrieval,
    "passage_count": count,
    "passage_retrieval_zh": retrieval_zh,
    "lcc": code_similarity,
    "repobench-p": code_similarity,
    "kv_retrieval": exact_match,  # of `glm32k make-data`
}
FIRST_LINE_ONLY = frozenset(("trec", "triviaqa", "samsum", "lsht"))  # few-shot: the model goes on with more examples


def metric_of(dataset: str, language: str | None = None) -> Callable[[str, str, list | None], float]:
    """The metric of a data set, LongBench-E's (`trec_e`) too; F1 by language for one that LongBench does not have."""
    return METRICS.get(plain_name(dataset), qa_f1_zh if language == "zh" else qa_f1)


def score_row(dataset: str, row: dict, classes: list | None) -> float:
    """The best score of one prediction over all reference answers, from 0 to 1.

    Args:
        dataset: its name.
        row: has `pred` and `answers`.
        classes: names of the classes, for classification.

    Raises:
        InputError: a field or a library that the metric needs is missing.
    """
    metric, prediction = metric_of(dataset, row.get("language")), row["pred"]
    if plain_name(dataset) in FIRST_LINE_ONLY:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((metric(prediction, answer, classes) for answer in row["answers"]), default=0.0)


@functools.cache
def _rouge():
    try:
        from rouge import Rouge
    except ImportError as error:
        raise InputError(f"the package rouge is needed for ROUGE-L ({error}); {EXTRA}") from error
    return Rouge(metrics=["rouge-l"])


@functools.cache
def _segmenter():
    try:
        import jieba
    except ImportError as error:
        raise InputError(f"the package jieba is needed for Chinese ({error}); {EXTRA}") from error
    jieba.setLogLevel("WARNING")
    return functools.partial(jieba.Tokenizer().cut, cut_all=False)  # unaffected by words added to jieba's global one

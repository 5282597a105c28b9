"""Rows as text: weights, cuts, tokens that are no text; prompts of training against those of prediction."""

import re

import numpy as np
import pytest

from mindformers_glm32k.data.encode import SampleEncoder
from mindformers_glm32k.data.formats import Chat, Sample, Turn
from mindformers_glm32k.data.render import TokenText, comparison
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer


@pytest.fixture(scope="module")
def tokenizer(small_vocab_file):
    return GLM32KTokenizer(str(small_vocab_file))


def written(tokenizer, sample, source_length=40, color=False, whole=False, weight=1.0):
    row = SampleEncoder(tokenizer, source_length, 15, 200).encode(sample)
    weights = np.where(row.labels != -100, weight, 0).astype(np.float32)
    return TokenText(tokenizer.vocabulary, color, whole).document(row.input_ids, row.labels, weights, row, weight)


def test_what_is_learnt_stands_in_brackets_with_its_weight(tokenizer):
    sample = Sample("ab <|user|>", "cd", (0, 2))
    assert written(tokenizer, sample) == (
        "«[gMASK]»«sop»«<|user|>» ⏎\n ab <|user|>«<|assistant|>»[1| ⏎\n cd][1|«</s>»]"
    )
    assert "[0.3333| ⏎\n cd]" in written(tokenizer, sample, weight=1 / 3)


def test_middle_turns_end_in_a_learnt_role_token(tokenizer):
    chat = Chat(
        (
            Turn("user", "a"),
            Turn("assistant", "b", in_loss=True),
            Turn("user", "c"),
            Turn("assistant", "d", in_loss=True),
        )
    )
    assert "[1| ⏎\n b][1|«<|user|>»] ⏎\n c«<|assistant|>»[1|" in written(tokenizer, chat)


def test_cuts_are_marked_with_what_is_gone(tokenizer):
    text = written(tokenizer, Sample("ab " * 60 + "cd?", "x", (0, 180)), source_length=30, whole=True)
    lost = int(re.search(r"✂ (\d+) tokens ✂", text)[1])
    kept = written(tokenizer, Sample("ab " * 60 + "cd?", "x", (0, 180)), source_length=150, whole=True)
    assert kept.count("ab") > text.count("ab") and lost > 30 and text.count("✂") == 2 and "✂" not in kept
    assert "cd?«<|assistant|>»" in text


def test_long_stretches_are_shortened_but_for_what_is_learnt(tokenizer):
    sample = Sample("ab " * 60, "cd " * 4, (0, 180))
    short, whole = (written(tokenizer, sample, 150, whole=value) for value in (False, True))
    assert re.search(r"ab … \d+ tokens … .*ab", short) and short.count("ab") < 60 == whole.count("ab")
    assert short.count("cd") == whole.count("cd") == 4


def test_colours_go_by_weight(tokenizer):
    sample = Sample("ab", "cd", (0, 2))
    row = SampleEncoder(tokenizer, 40, 15, 200).encode(sample)
    texts = []
    for weight in (0.1, 1.0):
        weights = np.where(row.labels != -100, weight, 0).astype(np.float32)
        texts.append(TokenText(tokenizer.vocabulary, True).document(row.input_ids, row.labels, weights, row, 1.0))
    assert "\x1b[38;5;28m ⏎\n cd\x1b[0m" in texts[0] and "\x1b[1;38;5;46m ⏎\n cd\x1b[0m" in texts[1]
    plain = re.sub(r"\x1b\[[\d;]*m", "", texts[0])
    assert plain == "[gMASK]sop<|user|> ⏎\n ab<|assistant|> ⏎\n cd</s>"


def test_labels_that_are_not_the_next_token_are_said(tokenizer):
    row = SampleEncoder(tokenizer, 40, 15, 200).encode(Sample("ab", "cd", (0, 2)))
    labels = row.labels.copy()
    labels[-2] += 1
    text = TokenText(tokenizer.vocabulary, False).document(row.input_ids, labels, (labels != -100) * 1.0, row, 1.0)
    assert f"(1 labels are not the next token, the first at {len(labels) - 1})" in text


def test_bytes_become_letters(tokenizer):
    writer = TokenText(tokenizer.vocabulary, False)
    assert writer.text(tokenizer.vocabulary.encode("x \u9f98\u65e5\n")) == " x \u9f98\u65e5⏎\n"
    assert "�" in writer.text(tokenizer.vocabulary.encode("\u9f98")[:-1])
    assert writer.text([tokenizer.vocab_size + 5]) == f"«{tokenizer.vocab_size + 5}»"


def test_comparison():
    def describe(ids):
        return ",".join(map(str, ids))

    assert comparison([1, 2, 3], [1, 2, 3], (), describe) == "the prompt's 3 tokens are those that prediction feeds"
    cut = comparison([1, 2, 7, 8], [1, 2, 3, 4, 7, 8], (2,), describe)
    assert "the first 2 are the same, and the last 2: what differs is the truncation alone" in cut
    other = comparison([1, 2, 9, 8], [1, 2, 3, 8], (), describe)
    assert "the first 2 are the same, and the last 1; from token 2 on training has '9,8', prediction '3,8'" in other
    shorter = comparison([1, 2], [1, 2, 3], (), describe)
    assert "the prompt has 2 tokens, prediction feeds 3; the first 2 are the same" in shorter

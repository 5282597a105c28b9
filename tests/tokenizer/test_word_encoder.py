"""Ids by words: the same as sentencepiece's own, or not used."""

import pickle

import pytest
from hypothesis import given, settings, strategies

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer import word_encoder
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from mindformers_glm32k.tokenizer.word_encoder import WordEncoder

PARTS = strategies.lists(
    strategies.sampled_from(
        [
            " ",
            "  ",
            " a",
            "b ",
            "the",
            "\n",
            "\r\n",
            "\t",
            "\u4f60",
            "\u597d",
            "\u2581",
            "\u0301",
            "\U0001f600",
            "0",
            "17",
            ".",
            ",",
            "<|user|>",
            "</s>",
            "\u3000",
            "\u00a0",
            "\uff21",
            "caf\u00e9",
            "-",
            "x" * 50,
            "\x00",
            "\u200b",
        ]
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def small(small_vocab_file):
    return Vocabulary(small_vocab_file)


@settings(max_examples=500, deadline=None)
@given(PARTS, strategies.text(max_size=20))
def test_any_text_has_the_same_ids(small, parts, text):
    encoder = WordEncoder(small)
    assert encoder.by_words
    for whole in ("".join(parts), text, " ".join(parts), text + "".join(parts)):
        assert encoder.encode(whole) == small.encode(whole)
        assert encoder.encode(whole) == small.encode(whole), "remembered"


@settings(max_examples=300, deadline=None)
@given(PARTS, strategies.text(max_size=20))
def test_with_the_published_vocabulary(reference, parts, text):
    if not hasattr(test_with_the_published_vocabulary, "pair"):
        vocabulary = Vocabulary(reference / "tokenizer" / "tokenizer.model")
        test_with_the_published_vocabulary.pair = vocabulary, WordEncoder(vocabulary)
    vocabulary, encoder = test_with_the_published_vocabulary.pair
    assert encoder.by_words
    for whole in ("".join(parts), text, " ".join(parts)):
        assert encoder.encode(whole) == vocabulary.encode(whole)


@pytest.mark.parametrize(
    "options",
    [
        {"split_by_whitespace": False, "vocab_size": 700},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"model_type": "unigram"},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=["over spaces", "spaces removed", "no prefix", "normalised", "unigram", "suffix"],
)
@settings(max_examples=60, deadline=None)
@given(parts=PARTS)
def test_other_vocabularies_are_right_too(train_vocabulary, options, parts):
    made = test_other_vocabularies_are_right_too.__dict__.setdefault("made", {})
    vocabulary = made.get(str(options)) or made.setdefault(str(options), Vocabulary(train_vocabulary(**options)))
    encoder = WordEncoder(vocabulary)
    assert encoder.encode("".join(parts)) == vocabulary.encode("".join(parts))


def test_what_cannot_be_split_is_not(train_vocabulary):
    assert not WordEncoder(Vocabulary(train_vocabulary(split_by_whitespace=False, vocab_size=700))).by_words
    assert not WordEncoder(Vocabulary(train_vocabulary(add_dummy_prefix=False))).by_words


def test_the_memory_has_a_bound(small, monkeypatch):
    monkeypatch.setattr(word_encoder, "WORDS", 100)
    encoder = WordEncoder(small)
    text = " ".join(f"w{number}" for number in range(500)) + " " + "y" * 100
    assert encoder.encode(text) == small.encode(text) and len(encoder._words) == 100


def test_errors_and_the_rest_are_the_vocabularys(small):
    encoder = WordEncoder(small)
    for wrong in (None, 3, "a \ud800 b"):
        with pytest.raises(InputError):
            encoder.encode(wrong)
    assert encoder.eos_id == small.eos_id and encoder.special == small.special and len(encoder.decode([5]))
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.encode("a b") == small.encode("a b") and copy.by_words

"""The retrieval task: one answer, in the context, and lengths that are kept."""

import random

import pytest

from mindformers_glm32k.data import synthetic as retrieval
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    retrieval.train_vocabulary(retrieval.sentences(0), path)
    vocabulary = Vocabulary(path)
    return lambda text: len(vocabulary.encode(text))


@pytest.mark.parametrize(
    "tokens, facts, filler", [(40, 8, 0.5), (234, 4, 0.5), (234, 1, 0.0), (234, 8, 0.99), (5000, 4, 0.7)]
)
def test_prompts_come_close_to_their_length_and_state_the_answer(count, tokens, facts, filler):
    task = retrieval.RetrievalTask(count, tokens, facts, filler)
    for seed in range(30):
        record = task.record(random.Random(seed))
        assert tokens - 12 < count(retrieval.TEMPLATE.format(**record)) <= tokens
        stated = {sentence for sentence in record["context"].split(". ")}
        facts_there = {line.rstrip(".") for line in stated if " is " in line}
        assert 1 <= len(facts_there) <= facts, "even where nearly all is filler"
        key = next(key for key in retrieval.FACTS if retrieval.question(key) == record["input"])
        asked_for = [f"{line}." for line in facts_there if line.startswith(f"The {key} is ")]
        assert asked_for == record["answers"], "the key asked for has one value"


def test_filler_states_no_facts():
    words = {word for key, values in retrieval.FACTS.items() for word in (key, *values)}
    for seed in range(500):
        assert not words & set(retrieval.filler(random.Random(seed)).rstrip(".").split())


def test_no_value_belongs_to_two_keys():
    values = [value for values in retrieval.FACTS.values() for value in values]
    assert len(values) == len(set(values)) and not set(values) & set(retrieval.FACTS)


def test_a_length_without_room_for_a_fact_is_refused(count):
    with pytest.raises(ValueError, match="at least"):
        retrieval.RetrievalTask(count, 10)


def test_it_fits_the_tiny_models_and_has_each_word_of_the_task_in_one_piece(tmp_path):
    retrieval.train_vocabulary(retrieval.sentences(0), tmp_path / "tokenizer.model")
    vocabulary = Vocabulary(tmp_path / "tokenizer.model")
    assert 800 < len(vocabulary) <= 1024
    for key, values in retrieval.FACTS.items():
        assert all(len(vocabulary.encode(word)) == 1 for word in (key, *values))
    # the same piece in the sentence and alone, as the answer
    assert vocabulary.encode("Oslo")[0] in vocabulary.encode(retrieval.fact("city", "Oslo"))


def test_it_spells_any_text_and_changes_none(tmp_path):
    retrieval.train_vocabulary(retrieval.sentences(0), tmp_path / "tokenizer.model")
    vocabulary = Vocabulary(tmp_path / "tokenizer.model")
    for text in ("长文 <|user|>\n\n\t 12345  é", " spaces  stay ", "ﬁ"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert vocabulary.unk_id not in vocabulary.encode(text)
    assert len(vocabulary.encode("\n")) == 2, "as in the published vocabulary"


def test_the_same_text_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        retrieval.train_vocabulary(retrieval.sentences(3), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

"""Vocabularies trained on the spot."""

from mindformers_glm32k.data import small_vocabulary
from mindformers_glm32k.data import synthetic as retrieval
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


def test_it_fits_the_tiny_models_and_has_each_word_of_the_task_in_one_piece(tmp_path):
    small_vocabulary.train(retrieval.sentences(0), tmp_path / "tokenizer.model")
    vocabulary = Vocabulary(tmp_path / "tokenizer.model")
    assert 800 < len(vocabulary) <= 1024
    for key, values in retrieval.FACTS.items():
        assert all(len(vocabulary.encode(word)) == 1 for word in (key, *values))
    # the same piece in the sentence and alone, as the answer
    assert vocabulary.encode("Oslo")[0] in vocabulary.encode(retrieval.fact("city", "Oslo"))


def test_it_spells_any_text_and_changes_none(tmp_path):
    small_vocabulary.train(retrieval.sentences(0), tmp_path / "tokenizer.model")
    vocabulary = Vocabulary(tmp_path / "tokenizer.model")
    for text in ("长文 <|user|>\n\n\t 12345  é", " spaces  stay ", "ﬁ"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert vocabulary.unk_id not in vocabulary.encode(text)
    assert len(vocabulary.encode("\n")) == 2, "as in the published vocabulary"


def test_the_same_text_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        small_vocabulary.train(retrieval.sentences(3), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

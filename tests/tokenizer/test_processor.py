import numpy as np
import pytest

from mindformers_glm32k import GLM32KTokenizer
from mindformers_glm32k.registry import load


@pytest.fixture(scope="module")
def tokenizer(small_vocab_file):
    return GLM32KTokenizer(str(small_vocab_file))


def test_texts_become_padded_ids(tokenizer):
    processor = load("GLM32KProcessor")(tokenizer=tokenizer, max_length=12, return_tensors="np")
    sequences = processor(["a few", "a"])["text"]
    assert sequences.shape == (2, 12)
    ids = tokenizer.encode("a")
    assert sequences[1].tolist() == [tokenizer.pad_token_id] * (12 - len(ids)) + ids


def test_padding_to_the_longest(tokenizer):
    sequences = load("GLM32KProcessor")(tokenizer=tokenizer, padding="longest", return_tensors="np")(["a few", "a"])[
        "text"
    ]
    assert np.shape(sequences) == (2, len(tokenizer.encode("a few")))


def test_a_saved_tokenizer_has_its_processor(tokenizer, tmp_path):
    """save_pretrained writes a YAML with the processor around the tokenizer, and AutoProcessor reads it."""
    from mindformers import AutoProcessor

    tokenizer.save_pretrained(str(tmp_path))
    processor = AutoProcessor.from_pretrained(str(tmp_path))
    assert type(processor) is load("GLM32KProcessor") and type(processor.tokenizer) is GLM32KTokenizer
    assert processor.tokenizer.encode("a few") == tokenizer.encode("a few")


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match="dict"):
        load("GLM32KProcessor")(tokenizer={})

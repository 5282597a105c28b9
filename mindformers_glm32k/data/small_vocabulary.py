"""Training a small sentencepiece vocabulary, built like the published one."""

from sentencepiece import SentencePieceTrainer

from mindformers_glm32k.files import atomic_path

PIECES = 1000  # with the nine special tokens below 1024, the padded_vocab_size of the tiny configurations


def train(sentences, path, pieces=PIECES):
    """Writes a vocabulary with at most `pieces` pieces; the same sentences give the same file.

    As in the published vocabulary, any byte can be spelled, digits stand alone, nothing is normalised, and
    <unk>, <s>, </s> have the ids 0, 1, 2.

    Args:
        sentences (Iterable[str]): the text.
        path (str | os.PathLike): the file to write.
        pieces (int): upper bound, > 256 + the letters of the text.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            model_type="bpe",
            vocab_size=pieces,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )

"""The table of lengths."""

from mindformers_glm32k.longbench.lengths import SEQUENCE, RecordLengths
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


def cells(lengths):
    return [line.split() for line in lengths.table().splitlines()[1:]]


def test_tokens_by_data_set_and_in_all(small_vocab_file, tmp_path):
    lengths = RecordLengths(Vocabulary(small_vocab_file))
    for name, side, digits, answer in [("b", "train", 9, 2), ("b", "heldout", 19, 5), ("a", "train", SEQUENCE, 1)]:
        lengths.add(side, {"dataset": name, "content": "1" * digits, "summary": "2" * answer})
    assert (lengths.records("train"), lengths.records("heldout")) == (2, 1)
    # a digit is a token, and a text begins with one more
    assert cells(lengths)[1:] == [
        ["a", "1", "0", *3 * [str(SEQUENCE + 1)], "2", "1"],
        ["b", "2", "1", "15", "19", "20", "6", "0"],
        ["all", "3", "1", "20", str(int(20 + 0.9 * (SEQUENCE - 19))), str(SEQUENCE + 1), "6", "1"],
    ]
    lengths.draw(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_vocabulary_the_records_own_length_is_shown():
    lengths = RecordLengths()
    lengths.add("train", {"dataset": "a", "length": 7})
    lengths.add("train", {"dataset": "a"})
    assert cells(lengths)[1] == ["a", "2", "0", "3", "6", "7"]

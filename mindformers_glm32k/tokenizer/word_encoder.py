"""The ids of a text put together from those of its words, which repeat: several times as fast as sentencepiece.

Sentencepiece writes a space as the letter `▁` in front of the word behind it, and puts one in front of the whole text.
Where no piece of the vocabulary goes on over such a border (a `▁` behind another letter), no merge does either, and

    encode("the old man")  =  encode("the") + encode("old") + encode("man")

Only a single space between two words is such a border; more of them belong to the word behind them. Texts without
spaces (Chinese) are one word, and cost what they did before.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

WORDS = 100_000  # remembered; some 25 MB
LONGEST = 40  # letters of a word that is remembered
_STRANGE = re.compile("[\u2581\ud800-\udfff]")  # a `▁` of the text's own, a space to sentencepiece; half a letter
_PROBES = (
    "a",
    "the old man",
    " a",
    "a ",
    "a  b",
    "  a   b  ",
    "a \n b\n\nc",
    "a\tb \t c",
    "\uff21 \ufb01 x",
    "1 22 3.3",
    "\u4f60\u597d \u4e16\u754c",
    "\u0301 a \u0301",
    "\U0001f600 \U0001f600\u200d",
    "\u3000 a\u3000b",
    " ",
    "  ",
    "\n",
)


class WordEncoder:
    """A vocabulary with a faster `encode`; all else is the vocabulary's.

    Attributes:
        by_words: whether it is one whose pieces end at spaces; if not, `encode` is the vocabulary's own.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._words = _Words(vocabulary.model)
        self.by_words = _ends_at_spaces(vocabulary.model) and all(
            self._join(text) == vocabulary.encode(text) for text in _PROBES
        )

    def encode(self, text: str) -> list[int]:
        """Exactly what the vocabulary's `encode` returns, its errors included."""
        if not self.by_words or not isinstance(text, str) or not text.isascii() and _STRANGE.search(text):
            return self._vocabulary.encode(text)
        return self._join(text)

    def _join(self, text):
        words = text.split(" ") if _is_plain(text) else _words_with_spaces(text)
        return list(chain.from_iterable(map(self._words.__getitem__, words)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # while it is being unpickled there is no vocabulary to ask
        return getattr(self._vocabulary, name)

    def __reduce__(self):
        return WordEncoder, (self._vocabulary,)


class _Words(dict):
    """word -> ids"""

    def __init__(self, model):
        super().__init__()
        self._model = model

    def __missing__(self, word):
        ids = self._model.encode(word)
        if len(word) <= LONGEST and len(self) < WORDS:
            self[word] = ids
        return ids


def _is_plain(text):
    return text[:1] not in ("", " ") and text[-1] != " " and "  " not in text


def _words_with_spaces(text):
    """The words; the first of several spaces is a border, the others are the next word's."""
    body = text.rstrip(" ")
    if not body:
        return [text]  # sentencepiece has pieces of several spaces
    words, spaces = [], ""
    for part in body.split(" "):
        if part:
            words.append(spaces + part)
            spaces = ""
        else:
            spaces += " "
    words[-1] += text[len(body) :]
    return words


def _ends_at_spaces(model):
    """Whether no piece has a space behind another letter."""
    pieces = model.id_to_piece(list(range(model.vocab_size())))
    return not any("\u2581" in piece[1:] and re.search("[^\u2581]\u2581", piece) for piece in pieces)

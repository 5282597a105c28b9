"""The published vocabulary: a sentencepiece model, followed by nine special tokens that no text can produce.

Ids 0 .. n-1 are the pieces of `tokenizer.model` (n = 64789 in the published one), n .. n+8 the special tokens
in the order of SPECIAL_TOKENS. Needs sentencepiece alone, so that data workers stay light, and `WordEncoder` gives
them the same ids several times as fast.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_file

ROLES = ("system", "user", "assistant", "observation")
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop") + ROLE_TOKENS

WHERE_TO_GET_IT = (
    "Take tokenizer.model from https://huggingface.co/THUDM/chatglm3-6b-32k, "
    "or let `glm32k make-data` write a small one."
)

_ROLE_PATTERN = re.compile("(" + "|".join(map(re.escape, ROLE_TOKENS)) + ")")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Vocabulary:
    """Text <-> ids. Picklable: the sentencepiece model travels with it, the file is not read again.

    Args:
        path: the `tokenizer.model` file.

    Attributes:
        special: the nine special tokens and their ids.
        bos_id, eos_id, unk_id: 1, 2 and 0 in the published vocabulary; unk serves as padding, too.

    Raises:
        InputError: the file is missing, empty, no sentencepiece model, or lacks <s>, </s> or <unk>.
    """

    def __init__(self, path: str | os.PathLike):
        self.model = _load(path)
        first = self.model.vocab_size()
        self.special = {token: first + offset for offset, token in enumerate(SPECIAL_TOKENS)}
        self.bos_id, self.eos_id, self.unk_id = self.model.bos_id(), self.model.eos_id(), self.model.unk_id()
        missing = [
            name for name, index in (("<s>", self.bos_id), ("</s>", self.eos_id), ("<unk>", self.unk_id)) if index < 0
        ]
        if missing:
            raise InputError(
                f"vocabulary file {path}: has no {' and no '.join(missing)}; train it with "
                "sentencepiece's default bos_id, eos_id and unk_id"
            )
        self._special_names = {index: token for token, index in self.special.items()}
        self._silent = {self.bos_id, self.eos_id, self.unk_id}

    def __len__(self) -> int:
        return self.model.vocab_size() + len(self.special)

    def encode(self, text: str, parse_roles: bool = False) -> list[int]:
        """The ids of `text`, without prefix or end token.

        Args:
            text: any text. `<|user|>` and the like are plain characters ...
            parse_roles: ... unless this is True: then the four role tokens become their ids, and each
                stretch between them is encoded on its own.

        Raises:
            InputError: `text` is no str, or holds a lone surrogate (half a character, no valid Unicode).
        """
        return self._encode(text, parse_roles, int, self.special.get)

    def pieces(self, text: str, parse_roles: bool = False) -> list[str]:
        """As `encode`, but pieces instead of ids."""
        return self._encode(text, parse_roles, str, str)

    def _encode(self, text, parse_roles, out_type, role_token):
        _require_text(text)
        if not parse_roles:
            return self.model.encode(text, out_type=out_type)
        result = []
        for index, part in enumerate(_ROLE_PATTERN.split(text)):
            if index % 2:
                result.append(role_token(part))
            elif part:
                result.extend(self.model.encode(part, out_type=out_type))
        return result

    def encode_batch(self, texts: Sequence[str], num_threads: int = -1) -> list[list[int]]:
        """The same ids as `encode` of each text, in parallel threads (-1: one per core)."""
        texts = list(texts)
        for text in texts:
            _require_text(text)
        return self.model.encode(texts, out_type=int, num_threads=num_threads) if texts else []

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`.

        <s>, </s>, <unk> and ids outside the vocabulary (a model's padded vocabulary, -100 in labels) have no text.
        The nine special tokens are written by name, or left out with `skip_special_tokens`.
        """
        ids = [int(index) for index in ids]
        if skip_special_tokens:
            size = self.model.vocab_size()  # special tokens and a padded vocabulary come after it
            ids = [index for index in ids if 0 <= index < size and index not in self._silent]
        if ids and min(ids) >= 0 and max(ids) < self.model.vocab_size() and self._silent.isdisjoint(ids):
            return self.model.decode(ids)  # pieces alone, as in long prompts: four times as fast, the same text
        return self.model.decode_pieces([self._surface(index) for index in ids])

    def _surface(self, index):
        if index in self._special_names:
            return self._special_names[index]
        if index in self._silent or not 0 <= index < self.model.vocab_size():
            return ""
        return self.model.id_to_piece(index)

    def token_id(self, token: str) -> int | None:
        """The id of a piece or special token; None when there is no such token."""
        if token in self.special:
            return self.special[token]
        index = self.model.piece_to_id(token)
        if index == self.unk_id and token != self.model.id_to_piece(index):
            return None
        return index

    def token(self, index: int) -> str:
        """The piece or special token of the id `index`; IndexError outside the vocabulary."""
        if not 0 <= index < len(self):
            raise IndexError(f"token id {index} is outside the vocabulary of {len(self)} tokens")
        return self._special_names.get(index) or self.model.id_to_piece(index)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the sentencepiece model to `path`, byte for byte the file it came from."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.model.serialized_model_proto())


def _load(path):
    path = require_file(path, "vocabulary file", WHERE_TO_GET_IT)
    try:
        proto = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"vocabulary file {path}: cannot be read ({error.strerror})") from error
    if proto.startswith(b"version https://git-lfs"):
        raise InputError(
            f"vocabulary file {path}: is a git-lfs pointer, not the file itself; run `git lfs pull`. {WHERE_TO_GET_IT}"
        )
    try:
        return SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, OSError, ValueError, TypeError) as error:  # the class differs between its versions
        raise InputError(
            f"vocabulary file {path}: is corrupt or no sentencepiece model ({len(proto)} bytes). {WHERE_TO_GET_IT}"
        ) from error


def _require_text(text):
    if not isinstance(text, str):
        raise InputError(f"a text (str) is needed, found {type(text).__name__}: {text!r:.80}")
    # sentencepiece refuses these too, but without saying where; JSON files hold them where text was truncated by bytes
    lone = None if text.isascii() else _SURROGATE.search(text)
    if lone:
        raise InputError(
            f"the text holds a lone surrogate U+{ord(lone.group()):04X} at character {lone.start()}, "
            "which is half a character and no valid Unicode; remove it or write the whole character"
        )


WORDS = 100_000  # words in the cache; some 25 MB
LONGEST = 40  # characters of a word in the cache, at most
_STRANGE = re.compile("[\u2581\ud800-\udfff]")  # `▁` in a text, a space to sentencepiece; lone surrogates
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
    """A vocabulary with a faster `encode`, which joins the cached ids of a text's words, because
    words repeat; all else is the vocabulary's.

    Sentencepiece writes a space as `▁` before the next word, and adds one before the whole text. Where no piece of the
    vocabulary crosses such a border (has `▁` after another character), no merge does either, and

        encode("the old man")  =  encode("the") + encode("old") + encode("man")

    Only a single space between two words is such a border; further ones belong to the next word. Texts without
    spaces (Chinese) are one word, and gain nothing.

    Attributes:
        by_words: whether no piece crosses a space; if one does, `encode` is the vocabulary's own.
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
            raise AttributeError(name)  # during unpickling `_vocabulary` is not set yet
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
    """Whether no piece has a space after another character."""
    pieces = model.id_to_piece(list(range(model.vocab_size())))
    return not any("\u2581" in piece[1:] and re.search("[^\u2581]\u2581", piece) for piece in pieces)

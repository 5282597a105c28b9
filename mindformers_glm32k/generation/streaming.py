"""Text while it is generated: whole characters only, the metadata line held back, nothing after the answer."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

from mindformers_glm32k.tokenizer.chat_format import stop_ids
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LONGEST_NAME = 64  # characters of a tool's name, as OpenAI has it


class IncrementalDecoder:
    """Decodes ids one at a time; the joined text is what `Vocabulary.decode` gives for all, special tokens left out.

    A character is held back until its last byte has come. The space before the first piece is dropped, as from a whole
    text; those before later pieces stay.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        # decoded in front of later pieces, so that their first space stays
        self._anchor = vocabulary.encode("a")
        self._anchor_text = vocabulary.decode(self._anchor)
        self._silent = {vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id}
        self._first = True
        self._held: list[int] = []

    def put(self, index: int) -> str:
        """The text that this id completes."""
        if not 0 <= index < self._vocabulary.model.vocab_size() or index in self._silent:
            return ""
        self._held.append(index)
        return "" if self._is_incomplete() else self._release()

    def end(self) -> str:
        """What is held back: half a character, shown as U+FFFD."""
        return self._release() if self._held else ""

    def _is_incomplete(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        waiting = False
        for index in self._held:
            byte = _BYTE.fullmatch(self._vocabulary.model.id_to_piece(index))
            if byte is None or not self._vocabulary.model.is_byte(index):
                decoder.reset()
                waiting = False
            else:
                decoder.decode(bytes([int(byte[1], 16)]))
                waiting = bool(decoder.getstate()[0])
        return waiting

    def _release(self):
        held, self._held = self._held, []
        if self._first:
            self._first = False
            return self._vocabulary.decode(held)
        return self._vocabulary.decode([*self._anchor, *held])[len(self._anchor_text) :]


class AnswerStreamer:
    """A streamer for `generate` with a batch of one: calls `show` with each new piece of the answer's text.

    The pieces joined are the content as `read_response` has it. A first line that is not blank may be the name of a
    tool: it is held back until its end, and a tool call is not shown at all; a line longer than a name is text.

    Args:
        vocabulary: of the model.
        show: called with text, never empty.
        stop: asked after each token; True ends the generation by `Stopped`.
    """

    def __init__(self, vocabulary: Vocabulary, show: Callable[[str], None], stop: Callable[[], bool] | None = None):
        self._vocabulary, self._show, self._stop = vocabulary, show, stop
        self._stops = set(stop_ids(vocabulary))
        self._again = vocabulary.special["<|assistant|>"]
        self._prompt_is_next = True
        self._ended = False
        self.ids: list[int] = []
        self.shown = False
        self._new_message()

    def _new_message(self):
        self._decoder = IncrementalDecoder(self._vocabulary)
        self._head: str | None = ""  # the first line so far; None once it is known what the message is
        self._is_call = False
        self._spaces = ""  # white space held back: at the end of a text it is dropped
        self._begun = False

    def put(self, value: Any) -> None:
        """Takes the prompt first, then each generated id; raises Stopped where it was asked to."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        index = int(value[0] if hasattr(value, "__len__") else value)
        self.ids.append(index)
        self._take(index)
        if self._stop is not None and self._stop():
            raise Stopped

    def _take(self, index):
        if self._ended or index in self._stops:
            self._ended = True
        elif index == self._again:
            self._finish()
            self._new_message()
        else:
            self._text(self._decoder.put(index))

    def end(self) -> None:
        """Shows what was held back."""
        self._finish()

    def _finish(self):
        self._text(self._decoder.end())
        if self._head is not None:  # no line break came: it is text
            head, self._head = self._head, None
            self._emit(head)

    def _text(self, text):
        if self._head is None:
            self._emit(text)
            return
        self._head += text
        line, newline, rest = self._head.partition("\n")
        if newline:
            self._head, self._is_call = None, bool(line.strip())
            self._emit(rest)
        elif len(line) > _LONGEST_NAME:
            self._head = None
            self._emit(line)

    def _emit(self, text):
        if self._is_call:
            return
        text = self._spaces + text
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._spaces = text[len(kept) :]
        if kept:
            if not self._begun and self.shown:
                kept = "\n" + kept  # between a text and what follows it
            self._begun = self.shown = True
            self._show(kept)


class Stopped(Exception):
    """The user does not want the rest of an answer."""

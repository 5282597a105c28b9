r"""One sample -> `input_ids` and `labels`.

One question with its answer (P: prompt, A: answer; `·` is the label -100, which is not in the loss):

               |--------------- prompt ---------------||----- answer -----|
    input_ids  [gMASK] sop <|user|> \n P1 P2 <|assistant|> \n  A1  A2  </s> <pad>
    labels        ·     ·     ·     ·  ·  ·       \n       A1  A2  </s>  ·     ·

A chat of several turns: every answer is in the loss, and so is the token that ends it. Only the last answer ends
in </s>; the others end where the next message begins, so there the model learns to produce the next role token:

    input_ids  … <|assistant|> \n  A1  A2  <|user|> \n  Q1 <|assistant|> \n  A3  </s>
    labels     …      \n       A1  A2 <|user|>  ·   ·   ·        \n      A3 </s>   ·

A tool call is an answer that ends in <|observation|>; what the tool returned is not in the loss. Plain text is in the
loss as a whole: `[gMASK] sop T1 T2 </s>` has the labels `· T1 T2 </s> ·`.

A prompt that is too long loses tokens inside a message, within the long document where its span is known
(`truncation.py` has the modes); head, tail, role tokens and answers stay:

    whole      [gMASK] sop <|user|> \n I1 I2 C1 C2 C3 C4 C5 C6 Q1 Q2 <|assistant|> \n A1 </s>
    truncated  [gMASK] sop <|user|> \n I1 I2 C1 C2       C6 Q1 Q2 <|assistant|> \n A1 </s>
                                                  ^ EncodedSample.cut_points

The model's loss compares the logits at a position with the label at the same position (it does not shift), so the
labels are shifted here: labels[i] is input_ids[i + 1] where that is in the loss. The prompt's ids are those of
`build_chat_input`, as in generation; all that follows <|assistant|> is in the loss, including the line break that the
published chat format puts there (and a tool's name before it). `\n` stands for two ids, the tokenizer's encoding of a
line break. Source of the loss mask: preprocess_utils.py of ChatGLM3's finetune_chatmodel_demo; its labels are one
position further right, because its model shifts them itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mindformers_glm32k.data.formats import Chat, Sample, Text
from mindformers_glm32k.data.truncation import LEAST, TRUNCATIONS, halves
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer import chat_format as chat

IGNORED = -100
RAISE, DROP = "raise", "drop"
ON_LONG_ANSWER = (RAISE, DROP)
_MAY_BE_TRUNCATED = ("user", "observation")
_LINE = 8  # tokens; an upper bound of a message's role token, line break and dummy prefixes
_STRADDLING = 4  # tokens to try at a border; where encoding normalizes the text, decoding never matches it


@dataclass(frozen=True)
class EncodedSample:
    """Tokens of one sample. A dropped sample has no tokens (only padding, once padded) and no labels.

    Attributes:
        input_ids: int32 (length,).
        labels: int32 (length,), IGNORED where a position is not in the loss.
        tokens_before: tokens before truncation, </s> included, padding not.
        tokens_after: tokens after truncation; 0 for a dropped sample.
        prompt_tokens: of tokens_before, those that are not in the loss.
        cut_points: positions in input_ids before which tokens were removed.
        dropped: why the sample was dropped; None if it was not.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tokens_before: int
    tokens_after: int
    prompt_tokens: int
    cut_points: tuple[int, ...] = ()
    dropped: str | None = None


def padded(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    """int32 (length,): the values, padded on the right with the filler."""
    sequence = np.full(length, filler, np.int32)
    sequence[: len(values)] = values
    return sequence


class SampleEncoder:
    """Encodes samples in the published chat format.

    Args:
        tokenizer: a GLM32KTokenizer, or any object with its `vocabulary`.
        max_source_length: tokens of one question's prompt, role tokens included; longer ones are truncated. An answer
            that does not fit beside the prompt shortens the prompt further.
        max_target_length: tokens of the answer that always fit, end token not counted.
        sequence_length: >= max_source_length + max_target_length + 1; the only limit for chats and plain text.
        truncation: one of TRUNCATIONS.
        on_long_answer: what happens where answers, role tokens and system messages alone are longer than a sequence:
            "raise" an InputError, or "drop" the sample.

    Raises:
        InputError: another kind of tokenizer, or a max_source_length that does not even hold the role tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_source_length: int,
        max_target_length: int,
        sequence_length: int,
        truncation: str = "middle",
        on_long_answer: str = RAISE,
    ):
        if not hasattr(tokenizer, "vocabulary"):
            raise InputError(
                f"tokenizer: {type(tokenizer).__name__} does not know ChatGLM3's role tokens; set type: GLM32KTokenizer"
            )
        self._vocabulary = tokenizer.vocabulary
        self._truncation, self._mode = truncation, TRUNCATIONS[truncation]
        self._on_long_answer = on_long_answer
        self.sequence_length = sequence_length
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        empty = chat.conversation_ids(self._vocabulary, [{"role": "user", "content": ""}], add_generation_prompt=True)
        if max_source_length < len(empty) + LEAST:
            raise InputError(
                f"max_source_length: {max_source_length} leaves no room for a question beside the "
                f"{len(empty)} tokens of the chat format; give at least {len(empty) + LEAST}"
            )

    def __call__(self, sample: Sample | Chat | Text) -> EncodedSample:
        """The sample padded to the sequence length; otherwise as `encode`."""
        encoded = self.encode(sample)
        return replace(
            encoded,
            input_ids=padded(encoded.input_ids, self.sequence_length, self._vocabulary.unk_id),
            labels=padded(encoded.labels, self.sequence_length, IGNORED),
        )

    def encode(self, sample: Sample | Chat | Text) -> EncodedSample:
        """The sample without padding; InputError where answers are too long and on_long_answer is "raise"."""
        pieces = self._text_pieces(sample) if isinstance(sample, Text) else self._chat_pieces(sample)
        before = sum(len(piece.ids) for piece in pieces)
        prompt = before - sum(len(piece.ids) for piece in pieces if piece.in_loss)
        limit = self.sequence_length
        if isinstance(sample, Sample):
            limit = min(limit, self.max_source_length + before - prompt)
        if before > limit:
            reason = self._truncate(pieces, limit)
            if reason:
                nothing = np.zeros(0, np.int32)
                return EncodedSample(nothing, nothing, before, 0, prompt, dropped=reason)
        return _assembled(pieces, before, prompt)

    def surely_fits(self, sample: Sample | Chat | Text) -> bool:
        """Whether the answers surely fit a sequence, judged by their bytes: a token has at least one byte."""
        if isinstance(sample, Text) or self._mode.share is None or self._on_long_answer != RAISE:
            return True
        most = _LINE
        for turn in sample.turns():
            most += _LINE + len(turn.metadata.encode()) + LEAST
            most += 0 if turn.role in _MAY_BE_TRUNCATED else len(turn.content.encode())
        return most <= self.sequence_length

    # --- samples to pieces ---

    def _chat_pieces(self, sample):
        vocabulary, turns = self._vocabulary, sample.turns()
        last = max(index for index, turn in enumerate(turns) if turn.in_loss)
        pieces, ends_an_answer = [_Piece(chat.prefix_ids(vocabulary))], False
        for turn in turns[: last + 1]:  # nothing after the last answer is in the loss
            source = turn if turn.role in _MAY_BE_TRUNCATED else None
            pieces += [
                _Piece([vocabulary.special[f"<|{turn.role}|>"]], ends_an_answer),
                _Piece(vocabulary.encode(f"{turn.metadata}\n"), turn.in_loss),
                _Piece(vocabulary.encode(turn.content), turn.in_loss, source),
            ]
            ends_an_answer = turn.in_loss
        end = vocabulary.special[f"<|{turns[last + 1].role}|>"] if turns[last + 1 :] else vocabulary.eos_id
        return pieces + [_Piece([end], in_loss=True)]

    def _text_pieces(self, sample):
        return [
            _Piece(chat.prefix_ids(self._vocabulary)),
            _Piece(self._vocabulary.encode(sample.text), in_loss=True, source=sample),
            _Piece([self._vocabulary.eos_id], in_loss=True),
        ]

    # --- truncation ---

    def _truncate(self, pieces, limit):
        """Truncates the pieces in place to `limit` tokens in total; returns why that is impossible (str), or None."""
        if self._mode.share is None:
            return f"{sum(len(piece.ids) for piece in pieces)} tokens, and there is room for {limit}"
        candidates = [piece for piece in pieces if piece.source is not None]
        lengths = [len(piece.ids) for piece in candidates]
        fixed = sum(len(piece.ids) for piece in pieces) - sum(lengths)
        if fixed + sum(min(length, LEAST) for length in lengths) > limit:
            reason = f"answers, role tokens and system messages have {fixed} tokens, and there is room for {limit}"
            if self._on_long_answer == RAISE:
                raise InputError(
                    f"{reason}; raise max_target_length or seq_length, shorten the answers, or set on_long_answer: drop"
                )
            return reason
        spare = self.sequence_length - limit
        for piece, room in zip(candidates, self._mode.share(lengths, limit - fixed)):
            if room < len(piece.ids):
                spare -= self._shorten(piece, room, spare)
        return None

    def _shorten(self, piece, room, spare):
        """Truncates one piece to `room` tokens; returns its tokens (int) above that, at most `spare`."""
        whole = piece.ids
        if self._mode.tokenize_again:
            half = room // 2
            piece.ids = self._vocabulary.encode(halves(whole, half, self._vocabulary.decode))
            while len(piece.ids) > room + spare:  # rare: a character split at the cut takes several byte tokens
                half -= max(1, (len(piece.ids) - room - spare) // 2)
                piece.ids = self._vocabulary.encode(halves(whole, half, self._vocabulary.decode)) if half > 0 else []
            piece.cut_point = min(half, len(piece.ids))
        else:
            head, tail = self._mode.keep(len(whole), room, self._context(piece))
            piece.ids, piece.cut_point = whole[:head] + whole[len(whole) - tail :], head
        return max(0, len(piece.ids) - room)

    def _context(self, piece):
        """The span of the context, in tokens; a token that straddles its border is not part of it."""
        ids, span = piece.ids, getattr(piece.source, "context", None)
        if self._truncation != "middle" or span is None:
            return 0, len(ids)
        encode, decode = self._vocabulary.encode, self._vocabulary.decode
        head, tail = piece.source.content[: span[0]], piece.source.content[span[1] :]
        before, behind = min(len(encode(head)), len(ids)), min(len(encode(tail)), len(ids))
        # Encoded alone, head and tail may have fewer tokens than in the whole text, where merges cross the border.
        for _ in range(_STRADDLING):
            before += before < len(ids) and not decode(ids[:before]).startswith(head)
            behind += behind < len(ids) and not decode(ids[len(ids) - behind :]).endswith(tail)
        return before, max(len(ids) - behind, before)


class _Piece:
    """A span of tokens that is in the loss as a whole or not at all; may be truncated where it has a source."""

    def __init__(self, ids, in_loss=False, source=None):
        self.ids, self.in_loss, self.source, self.cut_point = list(ids), in_loss, source, None


def _assembled(pieces, before, prompt):
    """Joins the pieces, labels one position ahead. A token after a cut point is unpredictable and not in the loss."""
    ids = np.array([index for piece in pieces for index in piece.ids], np.int32)
    loss_mask = np.repeat([piece.in_loss for piece in pieces], [len(piece.ids) for piece in pieces])
    cut_points, start = [], 0
    for piece in pieces:
        if piece.cut_point is not None:
            cut_points.append(start + piece.cut_point)
        start += len(piece.ids)
    loss_mask[[point for point in cut_points if point < len(ids)]] = False
    labels = np.full(len(ids), IGNORED, np.int32)
    labels[:-1] = np.where(loss_mask[1:], ids[1:], IGNORED)
    return EncodedSample(ids, labels, before, len(ids), prompt, tuple(cut_points))

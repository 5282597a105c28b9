r"""Rows for training: one sample -> `input_ids` and `labels`.

One question with its answer (P: prompt, A: answer; `·` is the label -100, which has no part in the loss):

               |--------------- prompt ---------------||----- answer -----|
    input_ids  [gMASK] sop <|user|> \n P1 P2 <|assistant|> \n  A1  A2  </s> <pad>
    labels        ·     ·     ·     ·  ·  ·       \n       A1  A2  </s>  ·     ·

A chat of several turns: every answer is learnt, and with it the token that ends it. Only the last answer ends in
</s>; the others end where the next message begins, so there the model learns to say the next role token:

    input_ids  … <|assistant|> \n  A1  A2  <|user|> \n  Q1 <|assistant|> \n  A3  </s>
    labels     …      \n       A1  A2 <|user|>  ·   ·   ·        \n      A3 </s>   ·

A tool call is an answer that ends in <|observation|>; what the tool returned is not learnt. Of plain text all is
learnt, `[gMASK] sop T1 T2 </s>` has the labels `· T1 T2 </s> ·`.

A prompt that is too long loses tokens inside a message, in the context where that is known (`truncation.py` has the
ways to cut); head, tail, role tokens and answers stay:

    without    [gMASK] sop <|user|> \n I1 I2 C1 C2 C3 C4 C5 C6 Q1 Q2 <|assistant|> \n A1 </s>
    cut        [gMASK] sop <|user|> \n I1 I2 C1 C2       C6 Q1 Q2 <|assistant|> \n A1 </s>
                                                  ^ Row.seams

The model's loss compares the logits at a place with the label at the same place (it does not shift), so the labels
are shifted here: labels[i] is input_ids[i + 1] where that is learnt. The prompt's ids are those of
`build_chat_input`, which generation feeds too; the model has to produce everything behind <|assistant|> itself, the
line break that the published chat format puts there (or a tool's name before it) included. `\n` stands for the two
ids that the tokenizer makes of a line break. Source of the mask: preprocess_utils.py of ChatGLM3's
finetune_chatmodel_demo, whose labels stand one place further right, for its model shifts them itself.
"""

from dataclasses import dataclass, replace
from typing import Optional

import numpy as np

from mindformers_glm32k.data.formats import Sample, Text
from mindformers_glm32k.data.truncation import LEAST, TRUNCATIONS, halves
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer import chat_format as chat

IGNORED = -100
RAISE, DROP = "raise", "drop"
ON_LONG_ANSWER = (RAISE, DROP)
_CUTTABLE = ("user", "observation")
_STRADDLING = 4  # tokens; a vocabulary that changes the text when it encodes it never gives it back


@dataclass(frozen=True)
class Row:
    """One row. What had to be left out as a whole has no tokens (or padding alone) and no labels.

    Attributes:
        input_ids (np.ndarray): int32 (length,).
        labels (np.ndarray): int32 (length,), IGNORED where there is nothing to learn.
        tokens_before (int): tokens of the row without any cut, </s> included, padding not.
        tokens_after (int): those that are left of them; 0 when the row was left out.
        prompt_tokens (int): of tokens_before, those that are not learnt.
        seams (tuple[int, ...]): places in input_ids before which tokens were cut out.
        dropped (str | None): why the row was left out.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tokens_before: int
    tokens_after: int
    prompt_tokens: int
    seams: tuple[int, ...] = ()
    dropped: Optional[str] = None


def padded(values, length, filler):
    """np.ndarray: int32 (length,), the values with the filler behind them."""
    row = np.full(length, filler, np.int32)
    row[: len(values)] = values
    return row


class RowBuilder:
    """Builds rows in the published chat format.

    Args:
        tokenizer: has `vocabulary`, as GLM32KTokenizer does.
        max_source_length (int): tokens of one question's prompt, role tokens included; longer ones are cut as
            `truncation` says. A longer answer than the row has room for beside it shortens the prompt further.
        max_target_length (int): tokens of its answer for which there is room in any case, end token not counted.
        row_length (int): tokens of the row, >= max_source_length + max_target_length + 1; the one limit for chats
            and plain text.
        truncation (str): one of TRUNCATIONS.
        on_long_answer (str): what happens where answers, role tokens and system messages alone are longer than a
            row: "raise" an InputError, or "drop" the row.

    Raises:
        InputError: another kind of tokenizer, or a max_source_length that does not even hold the role tokens.
    """

    def __init__(
        self, tokenizer, max_source_length, max_target_length, row_length, truncation="middle", on_long_answer=RAISE
    ):
        if not hasattr(tokenizer, "vocabulary"):
            raise InputError(
                f"tokenizer: {type(tokenizer).__name__} does not know ChatGLM3's role tokens; set type: GLM32KTokenizer"
            )
        self._vocabulary = tokenizer.vocabulary
        self._truncation, self._way = truncation, TRUNCATIONS[truncation]
        self._on_long_answer = on_long_answer
        self._row_length = row_length
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        empty = chat.conversation_ids(self._vocabulary, [{"role": "user", "content": ""}], add_generation_prompt=True)
        if max_source_length < len(empty) + LEAST:
            raise InputError(
                f"max_source_length: {max_source_length} leaves no room for a question beside the "
                f"{len(empty)} tokens of the chat format; give at least {len(empty) + LEAST}"
            )

    def __call__(self, sample):
        """Builds the row of one sample, padded to the row length.

        Args:
            sample (Sample | Chat | Text)

        Returns:
            Row

        Raises:
            InputError: answers too long for a row, where that is not to be dropped.
        """
        row = self.tokens(sample)
        return replace(
            row,
            input_ids=padded(row.input_ids, self._row_length, self._vocabulary.unk_id),
            labels=padded(row.labels, self._row_length, IGNORED),
        )

    def tokens(self, sample):
        """Builds the row of one sample without padding; otherwise as a call."""
        pieces = self._text_pieces(sample) if isinstance(sample, Text) else self._chat_pieces(sample)
        before = sum(len(piece.ids) for piece in pieces)
        prompt = before - sum(len(piece.ids) for piece in pieces if piece.learnt)
        limit = self._row_length
        if isinstance(sample, Sample):
            limit = min(limit, self.max_source_length + before - prompt)
        if before > limit:
            reason = self._cut(pieces, limit)
            if reason:
                nothing = np.zeros(0, np.int32)
                return Row(nothing, nothing, before, 0, prompt, dropped=reason)
        return _assembled(pieces, before, prompt)

    # --- samples to pieces ---

    def _chat_pieces(self, sample):
        vocabulary, turns = self._vocabulary, sample.turns()
        last = max(index for index, turn in enumerate(turns) if turn.learnt)
        pieces, ends_an_answer = [_Piece(chat.prefix_ids(vocabulary))], False
        for turn in turns[: last + 1]:  # behind the last answer there is nothing to learn
            pieces += [
                _Piece([vocabulary.special[f"<|{turn.role}|>"]], learnt=ends_an_answer),
                _Piece(vocabulary.encode(f"{turn.metadata}\n"), learnt=turn.learnt),
                _Piece(
                    vocabulary.encode(turn.content), learnt=turn.learnt, source=turn if turn.role in _CUTTABLE else None
                ),
            ]
            ends_an_answer = turn.learnt
        end = vocabulary.special[f"<|{turns[last + 1].role}|>"] if turns[last + 1 :] else vocabulary.eos_id
        return pieces + [_Piece([end], learnt=True)]

    def _text_pieces(self, sample):
        return [
            _Piece(chat.prefix_ids(self._vocabulary)),
            _Piece(self._vocabulary.encode(sample.text), learnt=True, source=sample),
            _Piece([self._vocabulary.eos_id], learnt=True),
        ]

    # --- cutting ---

    def _cut(self, pieces, limit):
        """Cuts the pieces in place so that `limit` tokens hold them; returns why that cannot be (str), or None."""
        if self._way.share is None:
            return f"{sum(len(piece.ids) for piece in pieces)} tokens, and there is room for {limit}"
        cuttable = [piece for piece in pieces if piece.source is not None]
        lengths = [len(piece.ids) for piece in cuttable]
        fixed = sum(len(piece.ids) for piece in pieces) - sum(lengths)
        if fixed + sum(min(length, LEAST) for length in lengths) > limit:
            reason = f"answers, role tokens and system messages have {fixed} tokens, and a row has room for {limit}"
            if self._on_long_answer == RAISE:
                raise InputError(
                    f"{reason}; raise max_target_length or seq_length, shorten the answers, or set on_long_answer: drop"
                )
            return reason
        spare = self._row_length - limit
        for piece, room in zip(cuttable, self._way.share(lengths, limit - fixed)):
            if room < len(piece.ids):
                spare -= self._shorten(piece, room, spare)
        return None

    def _shorten(self, piece, room, spare):
        """Cuts one piece; returns the tokens (int) that it has above `room`, at most `spare`."""
        whole = piece.ids
        if self._way.tokenize_again:
            half = room // 2
            piece.ids = self._vocabulary.encode(halves(whole, half, self._vocabulary.decode))
            while len(piece.ids) > room + spare:  # rare: letters broken in two have become several tokens
                half -= max(1, (len(piece.ids) - room - spare) // 2)
                piece.ids = self._vocabulary.encode(halves(whole, half, self._vocabulary.decode)) if half > 0 else []
            piece.seam = min(half, len(piece.ids))
        else:
            head, tail = self._way.keep(len(whole), room, self._context(piece))
            piece.ids, piece.seam = whole[:head] + whole[len(whole) - tail :], head
        return max(0, len(piece.ids) - room)

    def _context(self, piece):
        """Where the context stands, in tokens; a token that straddles its border is not part of it."""
        ids, span = piece.ids, getattr(piece.source, "context", None)
        if self._truncation != "middle" or span is None:
            return 0, len(ids)
        encode, decode = self._vocabulary.encode, self._vocabulary.decode
        head, tail = piece.source.content[: span[0]], piece.source.content[span[1] :]
        before, behind = min(len(encode(head)), len(ids)), min(len(encode(tail)), len(ids))
        # Alone they may have a token less than as parts of the whole, where letters join across the border.
        for _ in range(_STRADDLING):
            before += before < len(ids) and not decode(ids[:before]).startswith(head)
            behind += behind < len(ids) and not decode(ids[len(ids) - behind :]).endswith(tail)
        return before, max(len(ids) - behind, before)


class _Piece:
    """A stretch of tokens of one kind: learnt or not, to be cut (then it knows its source) or not."""

    def __init__(self, ids, learnt=False, source=None):
        self.ids, self.learnt, self.source, self.seam = list(ids), learnt, source, None


def _assembled(pieces, before, prompt):
    """Row: the pieces in a line, labels one place ahead. What follows a seam is no text that could be learnt."""
    ids = np.array([index for piece in pieces for index in piece.ids], np.int32)
    learnt = np.repeat([piece.learnt for piece in pieces], [len(piece.ids) for piece in pieces])
    seams, at = [], 0
    for piece in pieces:
        if piece.seam is not None:
            seams.append(at + piece.seam)
        at += len(piece.ids)
    learnt[[seam for seam in seams if seam < len(ids)]] = False
    labels = np.full(len(ids), IGNORED, np.int32)
    labels[:-1] = np.where(learnt[1:], ids[1:], IGNORED)
    return Row(ids, labels, before, len(ids), prompt, tuple(seams))

r"""Rows for training: one sample -> `input_ids` and `labels` of a fixed length.

What a row looks like (P: prompt, A: answer; `·` is the label -100, which has no part in the loss):

               |--------------- prompt ---------------||----- answer -----|
    input_ids  [gMASK] sop <|user|> \n P1 P2 <|assistant|> \n  A1  A2  </s> <pad>
    labels        ·     ·     ·     ·  ·  ·       \n       A1  A2  </s>  ·     ·

The model's loss compares the logits at a place with the label at the same place (it does not shift), so the labels
are shifted here: labels[i] is input_ids[i + 1] where that is a token of the answer or the end token. The prompt's
ids are those of `build_chat_input`, which generation feeds too; the model has to produce everything behind
<|assistant|> itself, the line break that the published chat format puts there included. `\n` stands for the two ids
that the tokenizer makes of a line break.
"""
from dataclasses import dataclass

import numpy as np

from mindformers_glm32k.data.truncation import TRUNCATIONS
from mindformers_glm32k.errors import InputError

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        input_ids (np.ndarray): int32 (row length,), padded with the tokenizer's pad_token_id.
        labels (np.ndarray): int32 (row length,), IGNORED where there is nothing to learn.
        prompt_tokens (int): tokens of the prompt before any cut, role tokens included.
        answer_tokens (int): tokens of the answer before any cut, line break included, end token not.
    """
    input_ids: np.ndarray
    labels: np.ndarray
    prompt_tokens: int
    answer_tokens: int


class RowBuilder:
    """Builds rows in the published chat format.

    Args:
        tokenizer: has build_chat_input(query), build_single_message(role, metadata, message), eos_token_id
            and pad_token_id.
        max_source_length (int): tokens of the prompt, role tokens included; longer ones are cut as `truncation` says.
        max_target_length (int): tokens of the answer without the end token; longer ones lose their end, and then
            there is no end token either, for the answer does not end there.
        row_length (int): tokens of the row, >= max_source_length + max_target_length + 1.
        truncation (str): one of TRUNCATIONS.

    Raises:
        InputError: max_source_length does not even hold the role tokens.
    """

    def __init__(self, tokenizer, max_source_length, max_target_length, row_length, truncation="middle"):
        self._tokenizer = tokenizer
        self._cut = TRUNCATIONS[truncation]
        self._row_length = row_length
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        empty = _ids(tokenizer.build_chat_input(""))
        self._head, self._tail = empty[:-1], empty[-1:]  # [gMASK] sop <|user|> \n and <|assistant|>
        if max_source_length < len(empty) + 2:
            raise InputError(f"max_source_length: {max_source_length} leaves no room for a question beside the "
                             f"{len(empty)} tokens of the chat format; give at least {len(empty) + 2}")

    def __call__(self, sample):
        """Builds the row of one sample.

        Args:
            sample (Sample)

        Returns:
            Row
        """
        text = self._text_ids(sample.prompt)
        room = self.max_source_length - len(self._head) - len(self._tail)
        head, tail = len(text), 0
        if len(text) > room:
            head, tail = self._cut(len(text), room, self._context_in_tokens(sample, len(text)))
        prompt = self._head + text[:head] + text[len(text) - tail:] + self._tail

        answer = self._tokenizer.build_single_message("assistant", "", sample.answer)[1:]
        learnt = answer[:self.max_target_length]
        if len(answer) <= self.max_target_length:
            learnt = learnt + [self._tokenizer.eos_token_id]

        input_ids = np.full(self._row_length, self._tokenizer.pad_token_id, np.int32)
        labels = np.full(self._row_length, IGNORED, np.int32)
        end = len(prompt) + len(learnt)
        input_ids[:end] = prompt + learnt
        labels[len(prompt) - 1:end - 1] = learnt
        return Row(input_ids, labels, len(self._head) + len(text) + len(self._tail), len(answer))

    def _text_ids(self, text):
        # A message is its role token, a line break and the text: what the tokenizer makes of the text alone.
        message = self._tokenizer.build_single_message("user", "", text)
        return message[len(self._tokenizer.build_single_message("user", "", "")):]

    def _context_in_tokens(self, sample, length):
        """Where the context stands, in tokens. A token may straddle the border, so it is kept, not cut."""
        start, stop = sample.context
        before = len(self._text_ids(sample.prompt[:start]))
        behind = len(self._text_ids(sample.prompt[stop:]))
        return min(before, length), max(length - behind, min(before, length))


def _ids(encoded):
    """list[int]: one conversation out of what build_chat_input returns (a batch of one, or a plain list)."""
    ids = np.asarray(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)
    return ids.reshape(-1).tolist()

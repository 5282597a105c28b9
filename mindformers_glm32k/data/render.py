"""A training sequence as readable text: what is in the loss and with which weight, where documents begin, what was
truncated, and whether its prompts are those that prediction feeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mindformers_glm32k.data.encode import IGNORED, EncodedSample
from mindformers_glm32k.data.formats import Chat, Sample, Text
from mindformers_glm32k.data.sources import SampleSource

SHOWN = 40  # tokens at each end of a long stretch
_RESET, _SPECIAL, _CUT, _BORDER = "\x1b[0m", "\x1b[7m", "\x1b[1;31m", "\x1b[36m"
_WEIGHTS = ("\x1b[38;5;28m", "\x1b[38;5;34m", "\x1b[38;5;40m", "\x1b[1;38;5;46m")  # from light to heavy


class TokenText:
    """Renders tokens as text.

    Args:
        vocabulary: the Vocabulary of the tokens.
        color: colours for a terminal; False: [weight|text] around what is in the loss.
        whole: every token; False: of a long stretch outside the loss only the first and last SHOWN.
    """

    def __init__(self, vocabulary: Any, color: bool, whole: bool = False):
        self._vocabulary, self._color, self._whole = vocabulary, color, whole
        self._roles = set(vocabulary.special.values())

    def legend(self) -> str:
        if not self._color:
            return "[weight|text] is in the loss with that weight; «token» is no text; ✂ N ✂: N tokens were cut out"
        scale = "".join(f"{code} {share}{_RESET}" for code, share in zip(_WEIGHTS, ("light", "…", "…", "heavy")))
        return (
            f"in the loss, by weight:{scale}; {_SPECIAL}token{_RESET} is no text; "
            f"{_CUT}✂ N ✂{_RESET}: N tokens were cut out"
        )

    def border(self, text: str) -> str:
        """A line between documents."""
        return self._paint(_BORDER, f"--- {text}")

    def document(
        self, ids: np.ndarray, labels: np.ndarray, weights: np.ndarray, encoded: EncodedSample, heaviest: float
    ) -> str:
        """The text of one document.

        Args:
            ids, labels, weights: (length,), its part of the columns; labels are one position ahead.
            encoded: the sample, for its cut points.
            heaviest: the largest weight of the whole sequence.
        """
        targets = np.concatenate(([IGNORED], labels[:-1]))  # the previous position's label: the expected token
        weight = np.where(targets == IGNORED, 0, np.concatenate(([0], weights[:-1])))
        special = np.isin(ids, list(self._roles)) | (ids == self._vocabulary.eos_id)
        changes = np.flatnonzero((np.diff(weight) != 0) | (np.diff(special) != 0)) + 1
        starts = sorted({0, *changes.tolist(), *(cut for cut in encoded.cut_points if cut < len(ids))})
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(ids)]):
            if start in encoded.cut_points:
                lost = f" {encoded.tokens_before - encoded.tokens_after} tokens" if len(encoded.cut_points) == 1 else ""
                parts.append(self._paint(_CUT, f"✂{lost} ✂"))
            if start < stop:
                parts.append(self._stretch(ids[start:stop], weight[start], special[start], heaviest))
        if len(ids) in encoded.cut_points:
            parts.append(self._paint(_CUT, "✂ ✂"))
        wrong = np.flatnonzero((targets != IGNORED) & (targets != ids))
        if len(wrong):
            parts.append(self._paint(_CUT, f" ({len(wrong)} labels are not the next token, the first at {wrong[0]})"))
        return "".join(parts)

    def _stretch(self, ids, weight, special, heaviest):
        if special:
            names = [self._vocabulary.token(int(index)) for index in ids]
            text = "".join(names if self._color else (f"«{name}»" for name in names))
        elif weight or self._whole or len(ids) <= 2 * SHOWN + 1:
            text = self.text(ids)
        else:
            left_out = self._paint(_BORDER, f" … {len(ids) - 2 * SHOWN} tokens … ")
            text = self.text(ids[:SHOWN]) + left_out + self.text(ids[len(ids) - SHOWN :])
        if not self._color:
            return f"[{weight:.4g}|{text}]" if weight else text
        code = _WEIGHTS[min(int(len(_WEIGHTS) * weight / heaviest), len(_WEIGHTS) - 1)] if weight else ""
        return self._paint((_SPECIAL if special else "") + code, text)

    def text(self, ids: Iterable[int]) -> str:
        """What the ids spell, spaces and line breaks (marked ⏎) included; bytes that are no UTF-8 as �."""
        vocabulary, spelt = self._vocabulary, []
        for index in map(int, ids):
            if index in self._roles or index >= len(vocabulary):
                spelt.append(f"«{vocabulary.token(index) if index < len(vocabulary) else index}»".encode())
            elif vocabulary.model.is_byte(index):
                spelt.append(bytes([int(vocabulary.model.id_to_piece(index)[1:-1], 16)]))
            else:
                spelt.append(vocabulary.model.id_to_piece(index).replace("\u2581", " ").encode("utf-8"))
        return b"".join(spelt).decode("utf-8", errors="replace").replace("\n", "⏎\n")

    def _paint(self, code, text):
        return f"{code}{text}{_RESET}" if self._color and code else text


class SequenceText:
    """Renders sequences, document by document.

    Args:
        samples: all samples.
        tokens: renders the tokens.
        tokenizer: the data set's GLM32KTokenizer.
        fed: prompt text -> the ids that prediction feeds.
        longest_prompt, seq_length: most tokens of a prompt in prediction, and of a prompt with its answer.
    """

    def __init__(
        self,
        samples: SampleSource,
        tokens: TokenText,
        tokenizer: Any,
        fed: Callable[[str], Sequence[int]],
        longest_prompt: int,
        seq_length: int,
    ):
        self._samples, self._tokens, self._tokenizer, self._fed = samples, tokens, tokenizer, fed
        self._longest_prompt, self._seq_length = longest_prompt, seq_length

    def write(
        self, number: int, indices: list[int], documents: list[EncodedSample], columns: dict[str, np.ndarray]
    ) -> str:
        """The text of sequence `number`.

        Args:
            number: from 1.
            indices: of the samples in it.
            documents: their tokens.
            columns: name -> array of the sequence, as the model gets it.
        """
        ids, labels, border = columns["input_ids"], columns["labels"], self._tokens.border
        length, used = len(ids), sum(len(document.input_ids) for document in documents)
        weights = columns.get("input_mask")
        if weights is None:
            weights = (labels != IGNORED).astype("float32")
        plural = "s" * (len(documents) != 1)
        padding = f"{100 * (1 - used / length):.1f} % padding"
        lines = [border(f"sequence {number}: {len(documents)} document{plural}, {used} of {length} tokens, {padding}")]
        end = 0
        for place, (index, document) in enumerate(zip(indices, documents), 1):
            start, end = end, end + len(document.input_ids)
            here = slice(start, end)
            in_loss = labels[here] != IGNORED
            title = (
                f"document {place} of {len(documents)}: {self._samples.location(index)}: {end - start} tokens, "
                f"{int(in_loss.sum())} in the loss"
            )
            if "input_mask" in columns and in_loss.any():
                title += f", weight {weights[here][in_loss].max():.4g} each"
            if document.dropped:
                title += f"; left out: {document.dropped}"
            elif document.cut_points:
                title += f"; truncated from {document.tokens_before} tokens"
            heaviest = float(weights.max()) or 1.0
            text = self._tokens.document(ids[here], labels[here], weights[here], document, heaviest)
            lines += [border(title), text]
            if not document.dropped:
                lines.append(border("prediction: " + self._against_prediction(self._samples[index], document)))
        if end < length:
            lines.append(border(f"padding: {length - end} tokens"))
        return "\n".join(lines)

    def _against_prediction(self, sample: Sample | Chat | Text, document: EncodedSample) -> str:
        """Compares what prediction would feed for a sample's last answer with the tokens before it in training."""
        if isinstance(sample, Text):
            return "plain text, which no prompt asks for"
        answer = self._tokenizer.vocabulary.special["<|assistant|>"]
        asked = np.flatnonzero((document.labels != IGNORED) & (document.input_ids == answer))
        if not len(asked):
            return "no answer is asked for in what is left"
        training = document.input_ids[: asked[-1] + 1].tolist()
        if isinstance(sample, Sample):
            prediction = self._fed(sample.prompt)
        else:
            before = _before_the_last_answer(sample)
            if not before:
                return "an answer to nothing, which no prompt asks for"
            *history, last = before
            prediction = self._tokenizer.build_chat_input(last["content"], history, last["role"])["input_ids"][0]
        prediction = [int(index) for index in prediction]
        text = comparison(training, prediction, document.cut_points, self._tokens.text)
        if len(prediction) > self._longest_prompt:
            text += (
                f"; prediction refuses it, for a prompt may have {self._longest_prompt} tokens "
                f"in seq_length {self._seq_length}"
            )
        return text


def _before_the_last_answer(chat):
    """The messages before the last turn that is in the loss."""
    turns = chat.turns()
    last = max(index for index, turn in enumerate(turns) if turn.in_loss)
    return [{"role": turn.role, "content": turn.content, "metadata": turn.metadata} for turn in turns[:last]]


def comparison(
    training: list[int], prediction: list[int], cut_points: Iterable[int], describe: Callable[[list[int]], str]
) -> str:
    """One sentence that compares a prompt in training with what prediction feeds, token by token.

    Args:
        training: ids of the sequence up to the <|assistant|> before the answer.
        prediction: ids that prediction feeds.
        cut_points: positions in `training` before which tokens were removed.
        describe: ids -> text.
    """
    if training == prediction:
        return f"the prompt's {len(training)} tokens are those that prediction feeds"
    short = min(len(training), len(prediction))
    same = next((index for index in range(short) if training[index] != prediction[index]), short)
    behind = next(
        (index for index in range(short - same) if training[-1 - index] != prediction[-1 - index]), short - same
    )
    text = (
        f"the prompt has {len(training)} tokens, prediction feeds {len(prediction)}; the first {same} are the same, "
        f"and the last {behind}"
    )
    if same + behind == len(training) and any(same - 1 <= cut <= same + 1 for cut in cut_points):
        return f"{text}: what differs is the truncation alone"
    return (
        f"{text}; from token {same} on training has {describe(training[same : same + 8])!r}, "
        f"prediction {describe(prediction[same : same + 8])!r}"
    )

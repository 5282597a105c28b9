"""A row of tokens as text for people: what is learnt and how much it weighs, where documents begin, what was cut."""

import numpy as np

from mindformers_glm32k.data.encode import IGNORED

SHOWN = 40  # tokens at each end of a long stretch
_RESET, _SPECIAL, _CUT, _BORDER = "\x1b[0m", "\x1b[7m", "\x1b[1;31m", "\x1b[36m"
_WEIGHTS = ("\x1b[38;5;28m", "\x1b[38;5;34m", "\x1b[38;5;40m", "\x1b[1;38;5;46m")  # from light to heavy


class RowText:
    """Writes rows.

    Args:
        vocabulary (Vocabulary): of the tokens.
        color (bool): colours for a terminal; False: [weight|text] around what is learnt.
        whole (bool): every token; False: of a long stretch that is not learnt, the first and last SHOWN.
    """

    def __init__(self, vocabulary, color, whole=False):
        self._vocabulary, self._color, self._whole = vocabulary, color, whole
        self._roles = set(vocabulary.special.values())

    def legend(self):
        """str: what the marks mean."""
        if not self._color:
            return "[weight|text] is learnt with that weight; «token» is no text; ✂ N ✂: N tokens were cut out"
        scale = "".join(f"{code} {share}{_RESET}" for code, share in zip(_WEIGHTS, ("light", "…", "…", "heavy")))
        return (
            f"learnt, by weight in the loss:{scale}; {_SPECIAL}token{_RESET} is no text; "
            f"{_CUT}✂ N ✂{_RESET}: N tokens were cut out"
        )

    def border(self, text):
        """str: a line between documents."""
        return self._paint(_BORDER, f"--- {text}")

    def document(self, ids, labels, weights, row, heaviest):
        """The text of one document.

        Args:
            ids, labels, weights (np.ndarray): (length,), its part of the columns; labels are one place ahead.
            row (Row): what was cut of it.
            heaviest (float): the largest weight of the whole row.

        Returns:
            str
        """
        learnt = np.concatenate(([IGNORED], labels[:-1]))  # what each token was to be when the one before it was read
        weight = np.where(learnt == IGNORED, 0, np.concatenate(([0], weights[:-1])))
        special = np.isin(ids, list(self._roles)) | (ids == self._vocabulary.eos_id)
        parts, start = [], 0
        for place in range(1, len(ids) + 1):
            if (
                place < len(ids)
                and weight[place] == weight[start]
                and special[place] == special[start]
                and place not in row.seams
            ):
                continue
            if start in row.seams:
                lost = f" {row.tokens_before - row.tokens_after} tokens" if len(row.seams) == 1 else ""
                parts.append(self._paint(_CUT, f"✂{lost} ✂"))
            parts.append(self._stretch(ids[start:place], weight[start], special[start], heaviest))
            start = place
        if len(ids) in row.seams:
            parts.append(self._paint(_CUT, "✂ ✂"))
        wrong = np.flatnonzero((learnt != IGNORED) & (learnt != ids))
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
            text = (
                self.text(ids[:SHOWN])
                + self._paint(_BORDER, f" … {len(ids) - 2 * SHOWN} tokens … ")
                + self.text(ids[len(ids) - SHOWN :])
            )
        if not self._color:
            return f"[{weight:.4g}|{text}]" if weight else text
        code = _WEIGHTS[min(int(len(_WEIGHTS) * weight / heaviest), len(_WEIGHTS) - 1)] if weight else ""
        return self._paint((_SPECIAL if special else "") + code, text)

    def text(self, ids):
        """str: what the ids spell, spaces and line breaks (marked ⏎) included; bytes that are no text as �."""
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


def comparison(training, prediction, seams, describe):
    """Compares a prompt in training with what prediction feeds, token by token.

    Args:
        training (list[int]): ids up to the first one that is to be learnt.
        prediction (list[int]): ids that the model would be fed.
        seams (Iterable[int]): places in `training` before which tokens were cut out.
        describe (Callable[[list[int]], str]): ids as text.

    Returns:
        str: one paragraph.
    """
    if training == prediction:
        return f"the prompt's {len(training)} tokens are those that prediction feeds"
    short = min(len(training), len(prediction))
    same = next((place for place in range(short) if training[place] != prediction[place]), short)
    behind = next(
        (place for place in range(short - same) if training[-1 - place] != prediction[-1 - place]), short - same
    )
    text = (
        f"the prompt has {len(training)} tokens, prediction feeds {len(prediction)}; the first {same} are the same, "
        f"and the last {behind}"
    )
    if same + behind == len(training) and any(same - 1 <= seam <= same + 1 for seam in seams):
        return f"{text}: what differs is the cut alone"
    return (
        f"{text}; from token {same} on training has {describe(training[same : same + 8])!r}, "
        f"prediction {describe(prediction[same : same + 8])!r}"
    )

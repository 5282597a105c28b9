"""How a conversation that is too long is cut, by the names of the YAML's `truncation`.

Only what users say and tools return is ever cut (in plain text: the text itself); role tokens, system messages and
answers stay. First the room is shared among these messages, then each message is cut to its share.

    middle     the longest messages give way first, down to one common length; the cut falls inside the context
               where that is known (LongBench's {context}), else in the middle, so that the question stays
    left       the oldest text goes first
    right      the newest text goes first; in a long prompt that is usually the question
    longbench  as middle, and of each message its first and its last half are decoded and tokenized again, as
               LongBench's pred.py does before it asks the model
    drop       nothing is cut; what is too long is left out
"""

from dataclasses import dataclass
from typing import Callable, Optional

LEAST = 2  # tokens that stay of any message


def middle(length, room, context):
    """Cuts in the middle of the context; instructions before it and the question behind it stay.

    Where they alone are longer than the room, the context goes and then the text before the question, of which at
    most half the room is left to a long beginning; the last words stay in any case.

    Args:
        length (int): tokens of the message's text, > room.
        room (int): tokens that may stay, >= 2.
        context (tuple[int, int]): where the context stands, in tokens, 0 <= start <= stop <= length.

    Returns:
        tuple[int, int]: tokens kept at the start and at the end; their sum is `room`.
    """
    before, behind = context[0], length - context[1]
    left_over = room - before - behind  # tokens of the context that may stay
    if left_over >= 0:
        head = before + (left_over + 1) // 2
    else:
        head = room - min(behind, room - min(before, room // 2))
    return head, room - head


def left(_length, room, _context):
    """Keeps the end; arguments and result as those of `middle`."""
    return 0, room


def right(_length, room, _context):
    """Keeps the beginning; arguments and result as those of `middle`."""
    return room, 0


def both_halves(_length, room, _context):
    """Keeps half the room, rounded down, at either end, as pred.py does; otherwise as `middle`."""
    return room // 2, room // 2


def level(lengths, room):
    """Shares the room so that the longest messages give way first, down to one common length.

    Args:
        lengths (list[int]): tokens of each message.
        room (int): tokens that may stay in all, at least LEAST (or the length, where that is less) for each message.

    Returns:
        list[int]: tokens that may stay of each message, <= its length; their sum is the smaller of room and all.
    """
    shares, left_over = [0] * len(lengths), room
    for place, index in enumerate(sorted(range(len(lengths)), key=lambda index: lengths[index])):
        shares[index] = min(lengths[index], left_over // (len(lengths) - place))
        left_over -= shares[index]
    return shares


def newest_first(lengths, room):
    """Shares the room so that the oldest text gives way first; otherwise as `level`."""
    return oldest_first(lengths[::-1], room)[::-1]


def oldest_first(lengths, room):
    """Shares the room so that the newest text gives way first; otherwise as `level`."""
    shares = [min(length, LEAST) for length in lengths]
    left_over = room - sum(shares)
    for index, length in enumerate(lengths):
        more = min(length - shares[index], left_over)
        shares[index] += more
        left_over -= more
    return shares


def halves(ids, half, decode):
    """LongBench's cut: the first and the last tokens, back as a text. Letters may break at its two inner ends.

    Source: pred.py of LongBench. Tokenizing the text again may give a few tokens more or less than 2 * half.

    Args:
        ids (list[int]): tokens of a text, more than 2 * half.
        half (int): tokens kept at either end, >= 1.
        decode (Callable[[list[int]], str]): the tokenizer's.

    Returns:
        str: the text of both ends, joined.
    """
    return decode(ids[:half]) + decode(ids[-half:])


@dataclass(frozen=True)
class Truncation:
    """One way to cut.

    Attributes:
        share (Callable | None): (lengths, room) -> tokens that may stay of each message; None where nothing is cut.
        keep (Callable | None): (length, room, context) -> tokens kept at the start and at the end of a message.
        tokenize_again (bool): whether the ends of a message are decoded, joined and tokenized again.
    """

    share: Optional[Callable] = None
    keep: Optional[Callable] = None
    tokenize_again: bool = False


TRUNCATIONS = {
    "middle": Truncation(level, middle),
    "left": Truncation(newest_first, left),
    "right": Truncation(oldest_first, right),
    "longbench": Truncation(level, both_halves, tokenize_again=True),
    "drop": Truncation(),
}

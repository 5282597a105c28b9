"""How a conversation that is too long is truncated: the modes of the YAML's `truncation`.

Only user messages and tool results lose tokens (in plain text: the text itself); role tokens, system messages and
answers stay. First the room is shared among the messages that may lose tokens, then each is truncated to its share.

    middle     the longest messages give way first, down to one common length; the cut falls inside the context
               where that is known (LongBench's {context}), else in the middle, so that the question stays
    left       the oldest text goes first
    right      the newest text goes first; in a long prompt that is usually the question
    longbench  as middle, but the two kept ends of a message are decoded, joined and tokenized again, as in LongBench's
               pred.py
    drop       nothing is truncated; a sample that is too long is dropped
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LEAST = 2  # tokens that stay of any message


def middle(length: int, room: int, context: tuple[int, int]) -> tuple[int, int]:
    """Removes the middle of the context; instructions before it and the question after it stay.

    Where these alone exceed the room, the whole context goes and the longer of the two is shortened as well; where both
    exceed half the room, the first one keeps half of it, rounded down, and the last one the rest.

    Args:
        length: tokens of the message's text, > room.
        room: tokens that may stay, >= 2.
        context: where the context stands, in tokens, 0 <= start <= stop <= length.

    Returns:
        tokens kept at the start and at the end; their sum is `room`.
    """
    before, behind = context[0], length - context[1]
    left_over = room - before - behind  # tokens of the context that may stay
    head = before + (left_over + 1) // 2 if left_over >= 0 else room - min(behind, room - min(before, room // 2))
    return head, room - head


def left(_length: int, room: int, _context: tuple[int, int]) -> tuple[int, int]:
    """Keeps the end; otherwise as `middle`."""
    return 0, room


def right(_length: int, room: int, _context: tuple[int, int]) -> tuple[int, int]:
    """Keeps the beginning; otherwise as `middle`."""
    return room, 0


def both_halves(_length: int, room: int, _context: tuple[int, int]) -> tuple[int, int]:
    """Keeps half the room, rounded down, at either end, as pred.py does; otherwise as `middle`."""
    return room // 2, room // 2


def level(lengths: list[int], room: int) -> list[int]:
    """Shares the room so that the longest messages give way first, down to one common length.

    Args:
        lengths: tokens of each message.
        room: tokens that may stay in all, at least LEAST (or the length, where that is less) for each message.

    Returns:
        tokens that may stay of each message, <= its length; their sum is min(room, sum(lengths)).
    """
    shares, left_over = [0] * len(lengths), room
    for done, index in enumerate(sorted(range(len(lengths)), key=lambda index: lengths[index])):
        shares[index] = min(lengths[index], left_over // (len(lengths) - done))
        left_over -= shares[index]
    return shares


def newest_first(lengths: list[int], room: int) -> list[int]:
    """Shares the room so that the oldest text gives way first; otherwise as `level`."""
    return oldest_first(lengths[::-1], room)[::-1]


def oldest_first(lengths: list[int], room: int) -> list[int]:
    """Shares the room so that the newest text gives way first; otherwise as `level`."""
    shares = [min(length, LEAST) for length in lengths]
    left_over = room - sum(shares)
    for index, length in enumerate(lengths):
        more = min(length - shares[index], left_over)
        shares[index] += more
        left_over -= more
    return shares


def halves(ids: list[int], half: int, decode: Callable[[list[int]], str]) -> str:
    """LongBench's truncation: the text of the first and the last `half` >= 1 tokens. A character may be split at
    the two inner ends.

    Source: pred.py of LongBench. Tokenizing the text again may give a few tokens more or less than 2 * half.
    """
    return decode(ids[:half]) + decode(ids[-half:])


@dataclass(frozen=True)
class Truncation:
    """One mode.

    Attributes:
        share: (lengths, room) -> tokens that may stay of each message; None where nothing is truncated.
        keep: (length, room, context) -> tokens kept at the start and at the end of a message.
        tokenize_again: whether the ends of a message are decoded, joined and tokenized again.
    """

    share: Callable | None = None
    keep: Callable | None = None
    tokenize_again: bool = False


TRUNCATIONS = {
    "middle": Truncation(level, middle),
    "left": Truncation(newest_first, left),
    "right": Truncation(oldest_first, right),
    "longbench": Truncation(level, both_halves, tokenize_again=True),
    "drop": Truncation(),
}

"""How a prompt that is too long is cut. Each way says how many tokens stay at the start and at the end."""


def middle(length, room, context):
    """Cuts in the middle of the context; instructions before it and the question behind it stay.

    Where they alone are longer than the room, the context goes and then the text before the question, of which at
    most half the room is left to a long beginning; the last words stay in any case.

    Args:
        length (int): tokens of the prompt's text, > room.
        room (int): tokens that may stay, >= 2.
        context (tuple[int, int]): where the context stands, in tokens, 0 <= start <= stop <= length.

    Returns:
        tuple[int, int]: tokens kept at the start and at the end; their sum is `room`.
    """
    before, behind = context[0], length - context[1]
    left = room - before - behind  # tokens of the context that may stay
    if left >= 0:
        head = before + (left + 1) // 2
    else:
        head = room - min(behind, room - min(before, room // 2))
    return head, room - head


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


# name in the YAML -> function(length, room, context) -> (head, tail)
TRUNCATIONS = {"middle": middle}

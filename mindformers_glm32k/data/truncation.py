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


# name in the YAML -> function(length, room, context) -> (head, tail)
TRUNCATIONS = {"middle": middle}

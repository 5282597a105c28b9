"""Where a long prompt is cut."""
import random

import pytest

from mindformers_glm32k.data.truncation import TRUNCATIONS, middle


def test_the_cut_is_in_the_middle_of_the_context():
    assert middle(100, 40, (10, 90)) == (20, 20)  # 10 before + 10 of the context, 10 of the context + 10 behind
    assert middle(100, 41, (0, 100)) == (21, 20)


def test_without_room_for_context_the_text_around_it_is_kept():
    assert middle(100, 20, (10, 90)) == (10, 10)


@pytest.mark.parametrize("length, room, context, kept", [
    (100, 20, (50, 95), (15, 5)),   # a long beginning gives way, the question stays
    (100, 20, (5, 50), (5, 15)),    # a question longer than the room loses its beginning
    (100, 20, (50, 50), (10, 10)),  # both too long: half and half
])
def test_when_even_the_text_around_the_context_is_too_long(length, room, context, kept):
    assert middle(length, room, context) == kept


def test_any_cut_fits_the_room_and_keeps_what_it_can():
    random.seed(0)
    for _ in range(2000):
        length = random.randint(3, 300)
        room = random.randint(2, length - 1)
        start = random.randint(0, length)
        stop = random.randint(start, length)
        for cut in TRUNCATIONS.values():
            head, tail = cut(length, room, (start, stop))
            assert head >= 0 and tail >= 0 and head + tail == room
            if start + length - stop <= room:
                assert head >= start and tail >= length - stop

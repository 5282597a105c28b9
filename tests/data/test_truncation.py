"""Where a conversation is cut."""

import random

import pytest

from mindformers_glm32k.data.truncation import LEAST, TRUNCATIONS, level, middle, newest_first, oldest_first

CUTTING = {name: way for name, way in TRUNCATIONS.items() if way.share}


def test_the_cut_is_in_the_middle_of_the_context():
    assert middle(100, 40, (10, 90)) == (20, 20)  # 10 before + 10 of the context, 10 of the context + 10 behind
    assert middle(100, 41, (0, 100)) == (21, 20)


def test_without_room_for_context_the_text_around_it_is_kept():
    assert middle(100, 20, (10, 90)) == (10, 10)


@pytest.mark.parametrize(
    "length, room, context, kept",
    [
        (100, 20, (50, 95), (15, 5)),  # a long beginning gives way, the question stays
        (100, 20, (5, 50), (5, 15)),  # a question longer than the room loses its beginning
        (100, 20, (50, 50), (10, 10)),  # both too long: half and half
    ],
)
def test_when_even_the_text_around_the_context_is_too_long(length, room, context, kept):
    assert middle(length, room, context) == kept


def test_the_other_ways_keep_an_end_or_both():
    assert TRUNCATIONS["left"].keep(100, 41, (10, 90)) == (0, 41)
    assert TRUNCATIONS["right"].keep(100, 41, (10, 90)) == (41, 0)
    assert TRUNCATIONS["longbench"].keep(100, 41, (10, 90)) == (20, 20)
    assert TRUNCATIONS["drop"].share is None


def test_which_message_gives_way():
    lengths = [10, 100, 60, 5]
    assert level(lengths, 95) == [10, 40, 40, 5]
    assert newest_first(lengths, 95) == [LEAST, 28, 60, 5]
    assert oldest_first(lengths, 95) == [10, 81, LEAST, LEAST]


def test_any_cut_fits_the_room_and_keeps_what_it_can():
    random.seed(0)
    for _ in range(2000):
        length = random.randint(3, 300)
        room = random.randint(2, length - 1)
        start = random.randint(0, length)
        stop = random.randint(start, length)
        for name, way in CUTTING.items():
            head, tail = way.keep(length, room, (start, stop))
            assert head >= 0 and tail >= 0 and room - 1 <= head + tail <= room
            if name == "middle" and start + length - stop <= room:
                assert head >= start and tail >= length - stop


def test_any_share_uses_the_whole_room_and_no_more():
    random.seed(1)
    for _ in range(2000):
        lengths = [random.randint(0, 80) for _ in range(random.randint(1, 9))]
        least = [min(length, LEAST) for length in lengths]
        room = random.randint(sum(least), sum(lengths))
        for way in CUTTING.values():
            shares = way.share(lengths, room)
            assert sum(shares) == room
            assert all(low <= share <= length for low, share, length in zip(least, shares, lengths))

"""Text while it is generated: the pieces joined are the whole text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_glm32k.generation.streaming import AnswerStreamer, IncrementalDecoder, Stopped
from mindformers_glm32k.tokenizer.response import read_response
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def small(small_vocab_file):
    return Vocabulary(small_vocab_file)


@pytest.fixture(scope="module", params=["small", "published"])
def vocabulary(request, small):
    if request.param == "small":
        return small
    return Vocabulary(request.getfixturevalue("reference") / "tokenizer" / "tokenizer.model")


def streamed(vocabulary, ids):
    decoder = IncrementalDecoder(vocabulary)
    pieces = [decoder.put(index) for index in ids] + [decoder.end()]
    return pieces


def answer(vocabulary, ids):
    """What a streamer shows of generated ids."""
    shown = []
    streamer = AnswerStreamer(vocabulary, shown.append)
    streamer.put([[1, 2, 3]])
    for index in ids:
        streamer.put(index)
    streamer.end()
    assert all(shown)
    return "".join(shown)


TEXTS = [
    "你好，世界。",
    " two  spaces ",
    "罕见字𠮷𪚥 and 🙂👩‍👩‍👧",
    "\n\n  indented\n\tcode",
    "é ü ß – “q”",
    "<0xE4>",
    "a",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_whole_and_in_whole_characters(vocabulary, text):
    ids = vocabulary.encode(text)
    pieces = streamed(vocabulary, ids)
    assert "".join(pieces) == vocabulary.decode(ids)
    assert "\ufffd" not in "".join(pieces)


def test_half_a_character_is_held_back(vocabulary):
    bytes_of = [vocabulary.model.piece_to_id(f"<0x{byte:02X}>") for byte in "𠮷".encode()]
    decoder = IncrementalDecoder(vocabulary)
    first = decoder.put(vocabulary.encode("a")[-1])
    assert [decoder.put(index) for index in bytes_of] == ["", "", "", "𠮷"]
    assert decoder.put(bytes_of[0]) == "" and decoder.end() == "\ufffd", "never completed"
    assert first == "a"


def test_an_id_without_text_does_not_part_a_character(small):
    first, second = (small.model.piece_to_id(f"<0x{byte:02X}>") for byte in "é".encode())
    for without_text in (len(small), small.special["<|user|>"], small.bos_id):
        ids = [first, without_text, second]
        assert "".join(streamed(small, ids)) == small.decode(ids, skip_special_tokens=True) == "é"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to(small, data):
    """Random ids, half of them bytes: broken characters, runs of spaces, special tokens, ids of the padding."""
    byte_ids = [small.model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    likely = [byte_ids[byte] for byte in (*"你𠮷é ".encode(), 0xED, 0xA0, 0x80, 0xFF, 0xC0)]
    space = small.model.piece_to_id("▁")
    one = st.one_of(st.sampled_from(likely), st.integers(0, len(small) + 3), st.just(space))
    ids = data.draw(st.lists(one, max_size=14))
    assert "".join(streamed(small, ids)) == small.decode(ids, skip_special_tokens=True)


def test_random_pieces_of_the_published_vocabulary(vocabulary):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(vocabulary.model.vocab_size()) for _ in range(12)]
        assert "".join(streamed(vocabulary, ids)) == vocabulary.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\n 你好 \n\nsecond line \n", "你好 \n\nsecond line"),
        ("no line break", "no line break"),
        ("get_weather\n```python\ntool_call(city='北京')\n```", ""),
        ("x" * 80 + " more", "x" * 80 + " more"),
        ("", ""),
        ("\n   ", ""),
    ],
)
def test_a_streamer_shows_the_content_alone(vocabulary, text, shown):
    ids = [*vocabulary.encode(text), vocabulary.special["<|user|>"], *vocabulary.encode("not an answer")]
    assert answer(vocabulary, ids) == shown
    response = read_response(vocabulary, ids)
    if not response.tool_call:
        assert response.content == shown


def test_a_text_and_the_call_behind_it(vocabulary):
    ids = [*vocabulary.encode("\n Let me look. "), vocabulary.special["<|assistant|>"]]
    call = [*vocabulary.encode("search\n"), *vocabulary.encode("tool_call(query='x')")]
    stop = vocabulary.special["<|observation|>"]
    assert answer(vocabulary, [*ids, *call, stop]) == "Let me look."
    assert answer(vocabulary, [*ids, *vocabulary.encode("\n Done."), 2]) == "Let me look.\nDone."
    assert read_response(vocabulary, [*ids, *call, stop]).tool_call.arguments == {"query": "x"}


def test_a_streamer_stops_when_it_is_asked_to(small):
    shown = []
    streamer = AnswerStreamer(small, shown.append, stop=lambda: len(streamer.ids) == 3)
    streamer.put([[1]])
    ids = small.encode("\n one two three four")
    with pytest.raises(Stopped):
        for index in ids:
            streamer.put(index)
    assert streamer.ids == ids[:3]

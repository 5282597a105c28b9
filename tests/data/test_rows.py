"""Rows: the ids of the published chat format, labels one place ahead, cuts that lose neither question nor answer."""
import json
import random

import numpy as np
import pytest

from mindformers_glm32k.data.layouts import Sample
from mindformers_glm32k.data.rows import IGNORED, RowBuilder
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer import GLM32KTokenizer


@pytest.fixture(scope="module")
def tokenizer(small_vocab_file):
    return GLM32KTokenizer(str(small_vocab_file))


def plain(prompt, answer):
    return Sample(prompt, answer, (0, len(prompt)))


def prompt_ids(tokenizer, prompt):
    return tokenizer.build_chat_input(prompt)["input_ids"][0].tolist()


def learnt(row):
    return row.labels[row.labels != IGNORED].tolist()


def test_a_row_is_what_generation_feeds_then_the_answer_and_the_end_token(tokenizer):
    row = RowBuilder(tokenizer, 60, 40, 101)(plain("hello world", "an answer"))
    prompt = prompt_ids(tokenizer, "hello world")
    line_break, answer = tokenizer.encode("\n", add_special_tokens=False), tokenizer.encode(
        "an answer", add_special_tokens=False)
    target = line_break + answer + [tokenizer.eos_token_id]
    used = len(prompt) + len(target)
    assert row.input_ids.tolist() == prompt + target + [tokenizer.pad_token_id] * (101 - used)
    assert row.labels.tolist() == [IGNORED] * (len(prompt) - 1) + target + [IGNORED] * (101 - used + 1)
    assert row.input_ids.dtype == row.labels.dtype == np.int32
    assert (row.prompt_tokens, row.answer_tokens) == (len(prompt), len(target) - 1)


def test_labels_are_the_inputs_one_place_ahead(tokenizer):
    """What the model's loss needs: logits at a place are compared with the label at the same place."""
    rng = random.Random(0)
    builder = RowBuilder(tokenizer, 40, 16, 60)
    for _ in range(200):
        texts = ["".join(rng.choices("abc dé长\n<|user|>0", k=rng.randint(1, 120))).strip() or "x" for _ in range(2)]
        row = builder(plain(*texts))
        at = np.flatnonzero(row.labels != IGNORED)
        assert (row.labels[at] == row.input_ids[at + 1]).all()
        assert (np.diff(at) == 1).all(), "one answer, one stretch"
        assert row.input_ids[at[0]] == tokenizer.get_command("<|assistant|>")
        assert (row.input_ids[at[-1] + 2:] == tokenizer.pad_token_id).all()
        role_tokens = [tokenizer.get_command(f"<|{role}|>") for role in ("user", "assistant")]
        assert [index for index in row.input_ids if index in role_tokens] == role_tokens
        if row.answer_tokens <= 16:
            assert row.labels[at[-1]] == tokenizer.eos_token_id


def test_a_long_prompt_keeps_its_start_its_question_and_the_role_tokens(tokenizer):
    context = " ".join(f"word{number}" for number in range(400))
    prompt = f"Read this: {context} And now: what is it?"
    sample = Sample(prompt, "the answer", (11, 11 + len(context)))
    whole = prompt_ids(tokenizer, prompt)
    row = RowBuilder(tokenizer, 120, 40, 161)(sample)
    kept = row.input_ids[:120].tolist()
    head = next(n for n in range(121) if kept[:n + 1] != whole[:n + 1])
    assert kept == whole[:head] + whole[len(whole) - (120 - head):], "one cut"
    text = tokenizer.decode(kept)
    assert "Read this: word0" in text and text.endswith("And now: what is it?<|assistant|>")
    assert learnt(row) == learnt(RowBuilder(tokenizer, 4000, 40, 4041)(sample)), "the whole answer"
    assert row.prompt_tokens == len(whole)


def test_the_cut_falls_into_the_context_even_where_that_is_not_the_middle(tokenizer):
    before, context, behind = "in " * 30, "con " * 30, "what is it then? " * 8
    sample = Sample(before + context + behind, "a", (len(before), len(before + context)))
    whole = len(prompt_ids(tokenizer, sample.prompt))
    text = tokenizer.decode(RowBuilder(tokenizer, whole - 20, 40, whole + 40)(sample).input_ids)
    assert before + "con" in text and behind in text and context not in text


def test_a_prompt_that_fits_exactly_is_not_cut(tokenizer):
    whole = prompt_ids(tokenizer, "some words that fit")
    row = RowBuilder(tokenizer, len(whole), 40, len(whole) + 41)(plain("some words that fit", "a"))
    assert row.input_ids[:len(whole)].tolist() == whole


def test_an_answer_that_is_cut_has_no_end_token(tokenizer):
    sample = plain("q", "one two three four five six seven eight")
    whole = learnt(RowBuilder(tokenizer, 40, 100, 141)(sample))
    exact = RowBuilder(tokenizer, 40, len(whole) - 1, 40 + len(whole))(sample)
    assert learnt(exact) == whole and whole[-1] == tokenizer.eos_token_id
    cut = RowBuilder(tokenizer, 40, len(whole) - 2, 40 + len(whole))(sample)
    assert learnt(cut) == whole[:-2]
    assert cut.answer_tokens == len(whole) - 1


def test_too_little_room_for_the_chat_format_is_an_error(tokenizer):
    with pytest.raises(InputError, match="max_source_length: 5 leaves no room"):
        RowBuilder(tokenizer, 5, 8, 14)


def test_prompts_have_the_published_ids(reference):
    tokenizer = GLM32KTokenizer(str(reference / "tokenizer" / "tokenizer.model"))
    golden = json.loads((reference / "tokenizer" / "golden.json").read_text(encoding="utf-8"))
    builder = RowBuilder(tokenizer, 200, 50, 251)
    chats = [chat for chat in golden["chats"] if not chat["history"] and chat["role"] == "user"]
    assert chats
    for chat in chats:
        row = builder(plain(chat["query"], "从前有座山。"))
        ids = chat["ids"] + [30910, 13, 37708, 54624, 54536, 55067, 54747, 31155, 2]  # as in golden.json's history
        assert row.input_ids[:len(ids)].tolist() == ids

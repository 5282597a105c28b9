"""Rows: the ids of the published chat format, labels one place ahead, cuts that lose neither question nor answer."""

import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_glm32k.data.chats import ChatLayout
from mindformers_glm32k.data.encode import IGNORED, SampleEncoder
from mindformers_glm32k.data.formats import Chat, LongBenchLayout, Sample, Text, Turn
from mindformers_glm32k.data.longbench import PromptTemplates
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer


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
    row = SampleEncoder(tokenizer, 60, 40, 101)(plain("hello world", "an answer"))
    prompt = prompt_ids(tokenizer, "hello world")
    line_break, answer = (
        tokenizer.encode("\n", add_special_tokens=False),
        tokenizer.encode("an answer", add_special_tokens=False),
    )
    target = line_break + answer + [tokenizer.eos_token_id]
    used = len(prompt) + len(target)
    assert row.input_ids.tolist() == prompt + target + [tokenizer.pad_token_id] * (101 - used)
    assert row.labels.tolist() == [IGNORED] * (len(prompt) - 1) + target + [IGNORED] * (101 - used + 1)
    assert row.input_ids.dtype == row.labels.dtype == np.int32
    assert (row.prompt_tokens, row.tokens_before, row.tokens_after) == (len(prompt), used, used)


def test_labels_are_the_inputs_one_place_ahead(tokenizer):
    """What the model's loss needs: logits at a place are compared with the label at the same place."""
    rng = random.Random(0)
    builder = SampleEncoder(tokenizer, 40, 16, 320)
    for _ in range(200):
        texts = ["".join(rng.choices("abc dé长\n<|user|>0", k=rng.randint(1, 120))).strip() or "x" for _ in range(2)]
        row = builder(plain(*texts))
        at = np.flatnonzero(row.labels != IGNORED)
        assert (row.labels[at] == row.input_ids[at + 1]).all()
        assert (np.diff(at) == 1).all(), "one answer, one stretch"
        assert row.input_ids[at[0]] == tokenizer.get_command("<|assistant|>")
        assert (row.input_ids[at[-1] + 2 :] == tokenizer.pad_token_id).all()
        role_tokens = [tokenizer.get_command(f"<|{role}|>") for role in ("user", "assistant")]
        assert [index for index in row.input_ids if index in role_tokens] == role_tokens
        assert row.labels[at[-1]] == tokenizer.eos_token_id


def test_a_long_prompt_keeps_its_start_its_question_and_the_role_tokens(tokenizer):
    context = " ".join(f"word{number}" for number in range(400))
    prompt = f"Read this: {context} And now: what is it?"
    sample = Sample(prompt, "the answer", (11, 11 + len(context)))
    whole = prompt_ids(tokenizer, prompt)
    row = SampleEncoder(tokenizer, 120, 40, 161)(sample)
    kept = row.input_ids[:120].tolist()
    head = next(n for n in range(121) if kept[: n + 1] != whole[: n + 1])
    assert kept == whole[:head] + whole[len(whole) - (120 - head) :], "one cut"
    text = tokenizer.decode(kept)
    assert "Read this: word0" in text and text.endswith("And now: what is it?<|assistant|>")
    assert learnt(row) == learnt(SampleEncoder(tokenizer, 4000, 40, 4041)(sample)), "the whole answer"
    assert row.prompt_tokens == len(whole)


def test_the_cut_falls_into_the_context_even_where_that_is_not_the_middle(tokenizer):
    before, context, behind = "in " * 30, "con " * 30, "what is it then? " * 8
    sample = Sample(before + context + behind, "a", (len(before), len(before + context)))
    whole = len(prompt_ids(tokenizer, sample.prompt))
    text = tokenizer.decode(SampleEncoder(tokenizer, whole - 20, 40, whole + 40)(sample).input_ids)
    assert before + "con" in text and behind in text and context not in text


def test_a_prompt_that_fits_exactly_is_not_cut(tokenizer):
    whole = prompt_ids(tokenizer, "some words that fit")
    row = SampleEncoder(tokenizer, len(whole), 40, len(whole) + 41)(plain("some words that fit", "a"))
    assert row.input_ids[: len(whole)].tolist() == whole


def test_a_long_answer_takes_its_room_from_the_prompt(tokenizer):
    sample = plain("word " * 40, "one two three four five six seven eight")
    whole = SampleEncoder(tokenizer, 400, 100, 501).encode(sample)
    row = SampleEncoder(tokenizer, 60, 10, 71).encode(sample)
    assert learnt(row) == learnt(whole) and row.tokens_after == 71
    assert row.tokens_before == whole.tokens_after and row.labels[-2] == tokenizer.eos_token_id


def test_answers_longer_than_a_row_are_an_error_or_left_out(tokenizer):
    sample = plain("q", "word " * 60)
    with pytest.raises(InputError, match="answers, role tokens and system .* room for 71.*on_long_answer"):
        SampleEncoder(tokenizer, 60, 10, 71)(sample)
    row = SampleEncoder(tokenizer, 60, 10, 71, on_long_answer="drop")(sample)
    assert "room for 71" in row.dropped and row.tokens_after == 0 < row.tokens_before
    assert (row.labels == IGNORED).all() and (row.input_ids == tokenizer.pad_token_id).all()


def test_drop_cuts_nothing(tokenizer):
    builder = SampleEncoder(tokenizer, 40, 16, 57, "drop")
    assert builder.encode(plain("word " * 60, "a")).dropped.endswith("there is room for 44")  # 40, the answer's 4
    fits = builder.encode(plain("word", "a"))
    assert fits.dropped is None and fits.tokens_after == fits.tokens_before


@pytest.mark.parametrize("truncation, kept", [("left", "w38 w39"), ("right", "w0 w1")])
def test_left_and_right_keep_the_other_end(tokenizer, truncation, kept):
    prompt = " ".join(f"w{number}" for number in range(40))
    row = SampleEncoder(tokenizer, 40, 16, 57, truncation).encode(plain(prompt, "the answer"))
    text = tokenizer.decode(row.input_ids)
    assert kept in text and len(row.cut_points) == 1
    assert learnt(row) == learnt(SampleEncoder(tokenizer, 400, 16, 417).encode(plain(prompt, "the answer")))
    assert prompt.startswith(text.split("\n")[1][:5].strip()) == (truncation == "right")


def test_longbench_rows_ask_what_pred_py_asks(reference):
    """The prompt of a row is the golden prompt where max_source_length leaves the six tokens of the chat format."""
    folder = reference / "longbench"
    tokenizer = GLM32KTokenizer(str(reference / "tokenizer" / "tokenizer.model"))
    builder = SampleEncoder(tokenizer, 3506, 2000, 5600, "longbench")
    layout = LongBenchLayout(PromptTemplates(folder / "dataset2prompt.json"))
    golden = [
        entry
        for entry in json.loads((folder / "golden_prompt_ids.json").read_text(encoding="utf-8"))
        if entry["max_length"] == 3500 and entry["dataset"] != "trec"
    ]
    assert any(entry["truncated"] for entry in golden)
    for entry in golden:
        lines = (folder / "data" / entry["file"]).read_text(encoding="utf-8").splitlines()
        row = builder.encode(layout.sample(json.loads(lines[entry["index"]])))
        prompt = row.input_ids[: np.flatnonzero(row.labels != IGNORED)[0] + 1]
        assert hashlib.sha256(prompt.astype("<i4").tobytes()).hexdigest() == entry["sha256"]


def test_longbench_cuts_fit_the_row_even_where_letters_break(tokenizer):
    rng = random.Random(2)
    for _ in range(200):
        prompt = "".join(rng.choices("长文é𝒳 a", k=rng.randint(30, 80)))
        for sample in (
            plain(prompt, "answer"),
            Chat((Turn("user", prompt), Turn("assistant", "answer", in_loss=True))),
        ):
            row = SampleEncoder(tokenizer, 30, 20, 51, "longbench").encode(sample)
            assert row.tokens_after <= 51 and learnt(row) == learnt(
                SampleEncoder(tokenizer, 900, 20, 921).encode(sample)
            )


def test_text_is_learnt_from_its_first_token_to_its_end(tokenizer):
    ids = tokenizer.encode("once upon a time", add_special_tokens=False) + [tokenizer.eos_token_id]
    row = SampleEncoder(tokenizer, 40, 16, 57).encode(Text("once upon a time"))
    assert row.input_ids.tolist() == tokenizer.get_prefix_tokens() + ids
    assert row.labels.tolist() == [IGNORED] + ids + [IGNORED]


@pytest.mark.parametrize("truncation, head", [("middle", 14), ("left", 0), ("right", 27), ("longbench", 13)])
def test_nothing_is_learnt_across_a_cut_in_text(tokenizer, truncation, head):
    row = SampleEncoder(tokenizer, 14, 15, 30, truncation).encode(Text("0123456789" * 10))
    assert row.cut_points == (2 + head,) and row.tokens_after <= 30
    assert row.labels[1 + head] == IGNORED and (row.labels[1 + head + 1 : -2] != IGNORED).all()


def test_a_chat_is_learnt_as_the_published_preprocessing_says(tokenizer):
    """The mask of ChatGLM3's finetune_chatmodel_demo: the token behind each token of an assistant's message."""
    messages = [
        ("system", "", "be brief"),
        ("user", "", "q one"),
        ("assistant", "", "thought"),
        ("assistant", "tool", "call()"),
        ("observation", "", "result"),
        ("assistant", "", "a one"),
        ("user", "", "q two"),
        ("assistant", "", "a two"),
    ]
    ids, inside = tokenizer.get_prefix_tokens(), [False, False]
    for role, metadata, content in messages:
        message = tokenizer.build_single_message(role, metadata, content)
        ids += message
        inside += [role == "assistant"] * len(message)
    ids.append(tokenizer.eos_token_id)
    expected = [ids[place + 1] if inside[place] else IGNORED for place in range(len(inside))] + [IGNORED]
    record = {
        "messages": [{"role": role, "metadata": metadata, "content": content} for role, metadata, content in messages]
    }
    row = SampleEncoder(tokenizer, 40, 16, 200).encode(ChatLayout().sample(record))
    assert row.input_ids.tolist() == ids and row.labels.tolist() == expected


def test_what_is_said_behind_the_last_answer_only_ends_it(tokenizer):
    builder = SampleEncoder(tokenizer, 40, 16, 200)
    chat = (Turn("user", "q"), Turn("assistant", "a", in_loss=True))
    ended = builder.encode(Chat(chat + (Turn("user", "more"), Turn("assistant", "x", in_loss=False))))
    plainly = builder.encode(Chat(chat))
    user = tokenizer.get_command("<|user|>")
    assert ended.input_ids.tolist() == plainly.input_ids.tolist()[:-1] + [user]
    assert learnt(ended)[-1] == user and learnt(plainly)[-1] == tokenizer.eos_token_id


def test_too_little_room_for_the_chat_format_is_an_error(tokenizer):
    with pytest.raises(InputError, match="max_source_length: 5 leaves no room"):
        SampleEncoder(tokenizer, 5, 8, 14)


def test_prompts_have_the_published_ids(reference):
    tokenizer = GLM32KTokenizer(str(reference / "tokenizer" / "tokenizer.model"))
    golden = json.loads((reference / "tokenizer" / "golden.json").read_text(encoding="utf-8"))
    builder = SampleEncoder(tokenizer, 200, 50, 251)
    chats = [chat for chat in golden["chats"] if not chat["history"] and chat["role"] == "user"]
    assert chats
    for chat in chats:
        row = builder(plain(chat["query"], "从前有座山。"))
        ids = chat["ids"] + [30910, 13, 37708, 54624, 54536, 55067, 54747, 31155, 2]  # as in golden.json's history
        assert row.input_ids[: len(ids)].tolist() == ids


def test_chats_have_the_published_ids(reference):
    """The golden chats of the published tokenizer as histories, with an answer behind them."""
    tokenizer = GLM32KTokenizer(str(reference / "tokenizer" / "tokenizer.model"))
    golden = json.loads((reference / "tokenizer" / "golden.json").read_text(encoding="utf-8"))
    builder = SampleEncoder(tokenizer, 200, 50, 4000)
    assert any(chat["role"] == "observation" for chat in golden["chats"])
    for chat in golden["chats"]:
        messages = [
            *chat["history"],
            {"role": chat["role"], "content": chat["query"]},
            {"role": "assistant", "content": "从前有座山。"},
        ]
        row = builder.encode(ChatLayout().sample({"messages": messages}))
        answer = [30910, 13, 37708, 54624, 54536, 55067, 54747, 31155, 2]  # as in golden.json's history
        assert row.input_ids.tolist() == chat["ids"] + answer
        assert row.labels.tolist()[-len(answer) - 1 :] == answer + [IGNORED]
        assert len(learnt(row)) > len(answer) or not any(turn["role"] == "assistant" for turn in chat["history"])


TEXTS = st.text(alphabet="ab 长é\n<|user|>0", max_size=60)
TURNS = st.builds(Turn, st.sampled_from(["system", "user", "observation"]), TEXTS) | st.builds(
    Turn, st.just("assistant"), TEXTS, st.sampled_from(["", "tool"]), st.booleans()
)
CHATS = st.lists(TURNS, min_size=1, max_size=6).map(
    lambda turns: Chat((*turns, Turn("assistant", "the end", in_loss=True)))
)
SAMPLES = st.tuples(TEXTS, TEXTS, TEXTS).flatmap(
    lambda texts: st.just(Sample("".join(texts), "an answer", (len(texts[0]), len(texts[0]) + len(texts[1]))))
)


@settings(max_examples=200, deadline=None)
@given(
    sample=CHATS | SAMPLES,
    truncation=st.sampled_from(["middle", "left", "right", "longbench"]),
    sequence_length=st.integers(20, 300),
)
def test_no_cut_ever_loses_a_token_of_an_answer(tokenizer, sample, truncation, sequence_length):
    whole = SampleEncoder(tokenizer, 5000, 100, 10000).encode(sample)
    row = SampleEncoder(tokenizer, 14, 5, sequence_length, truncation, "drop").encode(sample)
    if row.dropped:
        assert row.tokens_after == len(row.input_ids) == 0
        return
    assert learnt(row) == learnt(whole)
    assert len(row.input_ids) == len(row.labels) == row.tokens_after <= sequence_length
    assert row.tokens_before == whole.tokens_after and row.prompt_tokens == whole.prompt_tokens
    at = np.flatnonzero(row.labels != IGNORED)
    assert (row.labels[at] == row.input_ids[at + 1]).all()
    roles = {tokenizer.get_command(f"<|{role}|>") for role in ("system", "user", "assistant", "observation")}
    assert [index for index in row.input_ids if index in roles] == [
        index for index in whole.input_ids if index in roles
    ]
    if row.tokens_before == row.tokens_after and not row.cut_points:
        assert row.input_ids.tolist() == whole.input_ids.tolist()


@settings(max_examples=100, deadline=None)
@given(sample=SAMPLES, room=st.integers(14, 120))
def test_middle_keeps_instruction_and_question(tokenizer, sample, room):
    whole = SampleEncoder(tokenizer, 5000, 100, 10000).encode(sample)
    row = SampleEncoder(tokenizer, room, 100, 10000).encode(sample)
    start, stop = sample.context
    before, behind = (
        tokenizer.encode(part, add_special_tokens=False) for part in (sample.prompt[:start], sample.prompt[stop:])
    )
    around = len(before) + len(behind)
    if around <= room - 14:  # six tokens of the chat format, and up to four that straddle each border
        text = tokenizer.decode(row.input_ids)
        assert sample.prompt[:start].strip() in text and sample.prompt[stop:] + "<|assistant|>" in text
        assert row.input_ids[: 5 + len(before)].tolist() == whole.input_ids[: 5 + len(before)].tolist()
        end = len(learnt(row)) + 1 + len(behind)
        assert row.input_ids[-end:].tolist() == whole.input_ids[-end:].tolist()

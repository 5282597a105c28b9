"""The tokenizer's chat methods, against the published tokenizer and as transformers' users expect them."""

import json

import numpy as np
import pytest

from mindformers_glm32k import GLM32KTokenizer
from mindformers_glm32k.errors import InputError

CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c d e"},
]


@pytest.fixture(scope="module")
def tokenizer(small_vocab_file):
    return GLM32KTokenizer(str(small_vocab_file))


@pytest.fixture(scope="module")
def published(reference):
    return GLM32KTokenizer(str(reference / "tokenizer" / "tokenizer.model"), encode_special_tokens=True)


@pytest.fixture(scope="module")
def chats(reference):
    return json.loads((reference / "tokenizer" / "golden.json").read_text(encoding="utf-8"))["chats"]


def test_chats_are_the_published_ones(published, chats):
    """Role tokens in contents stay text, even where `encode` parses them."""
    for case in chats:
        history = json.loads(json.dumps(case["history"]))
        encoded = published.build_chat_input(case["query"], history, case["role"])
        assert encoded["input_ids"].shape == (1, len(case["ids"]))
        assert encoded.input_ids[0].tolist() == case["ids"]
        assert encoded["attention_mask"].all()
        assert encoded["position_ids"].tolist() == [list(range(len(case["ids"])))]
        assert history == case["history"]
        as_lists = published.build_chat_input(case["query"], history, case["role"], return_tensors=None)
        assert as_lists["input_ids"] == [case["ids"]]
        messages = [*history, {"role": case["role"], "content": case["query"]}]
        assert published.apply_chat_template(messages, add_generation_prompt=True) == case["ids"]


def test_batches_of_chats_are_padded_on_the_left(published, chats):
    queries, histories, roles = ([case[key] for case in chats] for key in ("query", "history", "role"))
    encoded = published.build_batch_input(queries, histories, roles)
    width = max(len(case["ids"]) for case in chats)
    assert encoded["input_ids"].shape == (len(chats), width)
    for sequence, mask, case in zip(encoded["input_ids"], encoded["attention_mask"], chats):
        assert sequence.tolist() == [0] * (width - len(case["ids"])) + case["ids"]
        assert mask.sum() == len(case["ids"]) and mask[-1] == 1
    ragged = published.build_batch_input(queries, histories, roles, padding=False, return_tensors=None)
    assert ragged["input_ids"] == [case["ids"] for case in chats]


def test_batches_take_what_stands_for_all(tokenizer):
    alone = tokenizer.build_chat_input("c d e", CONVERSATION[:3])["input_ids"]
    assert np.array_equal(tokenizer.build_batch_input("c d e", CONVERSATION[:3])["input_ids"], alone)
    assert np.array_equal(tokenizer.build_batch_input(["c d e"], [CONVERSATION[:3]], ["user"])["input_ids"], alone)
    two = tokenizer.build_batch_input(["a", "a"], [None, []])["input_ids"]
    assert np.array_equal(two[0], two[1])
    for arguments in ((["a", "b"], [[]]), (["a", "b"], None, ["user"])):
        with pytest.raises(InputError, match="as many"):
            tokenizer.build_batch_input(*arguments)


def test_templates_return_what_is_asked_for(tokenizer):
    ids = tokenizer.apply_chat_template(CONVERSATION)
    prompt = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert isinstance(ids, list) and prompt == [*ids, tokenizer.get_command("<|assistant|>")]
    assert prompt == tokenizer.build_chat_input("c d e", CONVERSATION[:3])["input_ids"][0].tolist()
    assert tokenizer.eos_token_id not in ids
    assert np.array_equal(tokenizer.apply_chat_template(CONVERSATION, return_tensors="np"), [ids])
    flat = tokenizer.apply_chat_template(CONVERSATION, return_dict=True)
    assert flat["input_ids"] == ids and flat["attention_mask"] == [1] * len(ids)
    both = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_tensors="np")
    assert both["input_ids"].shape == both["attention_mask"].shape == (1, len(ids))
    text = "[gMASK]sop<|system|> \n be brief<|user|> \n a<|assistant|> \n b<|user|> \n c d e<|assistant|>"
    assert tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False) == text


def test_templates_take_batches_and_tools(tokenizer):
    batch = [CONVERSATION, CONVERSATION[1:2]]
    long, short = tokenizer.apply_chat_template(batch)
    assert long == tokenizer.apply_chat_template(CONVERSATION)
    padded = tokenizer.apply_chat_template(batch, padding=True, return_tensors="np")
    assert padded[1].tolist() == [0] * (len(long) - len(short)) + short
    assert len(tokenizer.apply_chat_template(batch, tokenize=False)) == 2
    tools = [{"name": "clock"}]
    given = tokenizer.apply_chat_template(CONVERSATION, tools=tools)
    assert given == tokenizer.apply_chat_template([{**CONVERSATION[0], "tools": tools}, *CONVERSATION[1:]])


@pytest.mark.parametrize(
    "arguments",
    [
        {"conversation": []},
        {"conversation": "hello"},
        {"conversation": ["hello"]},
        {"conversation": CONVERSATION, "chat_template": "{{ messages }}"},
        {"conversation": CONVERSATION, "truncation": True, "max_length": 5},
        {"conversation": CONVERSATION[1:], "tools": [{"name": "clock"}]},
    ],
)
def test_templates_refuse_what_would_break_the_format(tokenizer, arguments):
    with pytest.raises(InputError):
        tokenizer.apply_chat_template(**arguments)


def test_single_messages_make_up_the_conversation(tokenizer):
    joined = tokenizer.get_prefix_tokens()
    for message in CONVERSATION:
        joined += tokenizer.build_single_message(message["role"], "", message["content"])
    assert joined == tokenizer.apply_chat_template(CONVERSATION)


def test_answers_leak_no_role_tokens(tokenizer):
    prompt = tokenizer.build_chat_input("a")["input_ids"][0]
    answer = [*tokenizer.vocabulary.encode("\n"), *tokenizer.vocabulary.encode("b c")]
    for stop in tokenizer.stop_token_ids:
        generated = np.array([*prompt, *answer, stop, *tokenizer.vocabulary.encode("d"), 0, 0])
        assert tokenizer.decode_answer(generated, len(prompt)) == "b c"
        assert tokenizer.answer_ids(generated, len(prompt)) == answer
    unfinished = [*prompt, *answer, tokenizer.get_command("<|assistant|>")]
    assert tokenizer.decode_answer(unfinished, len(prompt)) == "b c"
    assert tokenizer.decode_answer(answer) == "b c"

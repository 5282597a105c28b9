"""glm32k make-data: the files, their lengths, and that the same options give the same."""

import json

import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.data.synthetic import MAX_TARGET_LENGTH
from mindformers_glm32k.tokenizer import chat_format as chat
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

NAMES = ["dataset2prompt.json", "eval.jsonl", "tokenizer.model", "train.jsonl"]


def make(folder, *options):
    return cli.main(["make-data", "--output_dir", str(folder), "--samples", "30", "--eval_samples", "8", *options])


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_have_the_fields_of_both_layouts(tmp_path):
    assert make(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    train, held_out = read(tmp_path / "train.jsonl"), read(tmp_path / "eval.jsonl")
    assert len(train) == 30 and len(held_out) == 8
    for row in train + held_out:
        assert set(row) == {
            "content",
            "summary",
            "input",
            "context",
            "answers",
            "length",
            "dataset",
            "language",
            "all_classes",
            "_id",
        }
        assert row["answers"] == [row["summary"]] and row["length"] == len(row["context"].split())
    everything = [row["content"] for row in train + held_out]
    assert len(set(everything)) == 38, "no row twice, none of the held-out ones in the training rows"


def test_both_layouts_give_the_same_prompts(tmp_path):
    make(tmp_path)
    adgen = SampleSource(tmp_path / "train.jsonl", layout="adgen")
    longbench = SampleSource(
        tmp_path / "train.jsonl", layout="longbench", prompt_config_file=tmp_path / "dataset2prompt.json"
    )
    for index in range(len(adgen)):
        assert (adgen[index].prompt, adgen[index].answer) == (longbench[index].prompt, longbench[index].answer)


@pytest.mark.parametrize("seq_length", [64, 256, 4096, 32768])
def test_rows_come_close_to_seq_length_and_fit(tmp_path, seq_length):
    make(tmp_path, "--seq_length", str(seq_length), "--samples", "3", "--eval_samples", "1")
    vocabulary = Vocabulary(tmp_path / "tokenizer.model")
    assert len(vocabulary) <= 1024
    for row in read(tmp_path / "train.jsonl") + read(tmp_path / "eval.jsonl"):
        user = {"role": "user", "content": row["content"]}
        prompt = len(chat.conversation_ids(vocabulary, [user], add_generation_prompt=True))
        answer = len(chat.message_ids(vocabulary, "assistant", "", row["summary"])) - 1
        assert prompt <= seq_length - MAX_TARGET_LENGTH - 1 and answer <= MAX_TARGET_LENGTH
        assert seq_length - 28 < prompt + answer + 1 <= seq_length


def test_the_same_seed_gives_the_same_files_and_another_one_does_not(tmp_path):
    make(tmp_path / "a", "--seed", "7")
    make(tmp_path / "b", "--seed", "7")
    make(tmp_path / "c", "--seed", "8")
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seq_length", "30"], "--seq_length 30: too short"),
        (["--seq_length", "32769"], "--seq_length 32769: must be from 1 to 32768"),
        (["--samples", "0", "--facts", "9"], "--samples 0: must be at least 1; --facts 9: must be from 1 to 8"),
        (["--filler", "1.0"], "--filler 1.0"),
        (["--seq_length", "64", "--facts", "1", "--filler", "0"], "different records with these options"),
    ],
)
def test_options_that_do_not_work_are_named_and_nothing_is_written(tmp_path, capsys, options, message):
    assert make(tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_file_in_the_folders_place_is_named(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert make(tmp_path / "out") == 2
    assert "is a file" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"

"""`glm32k inspect` on the tiny data, on LongBench's layout, and on what it refuses."""

import json
import re

import pytest
from conftest import ROOT

from mindformers_glm32k.cli import main

CONFIG = str(ROOT / "research" / "glm32k" / "finetune_glm32k_tiny_cpu.yaml")


def printed(capsys, *words):
    status = main(["inspect", "--config", CONFIG, *words])
    captured = capsys.readouterr()
    return status, "\n".join(line for line in captured.out.splitlines() if " - mindformers" not in line), captured.err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The options for data of `glm32k make-data`."""
    folder = tmp_path_factory.mktemp("tiny")
    assert (
        main(
            ["make-data", "--output_dir", str(folder), "--seq_length", "96", "--samples", "40", "--eval_samples", "10"]
        )
        == 0
    )
    return [
        word
        for kind in ("train", "eval")
        for word in (
            f"--{kind}_dataset_dir",
            str(folder / f"{kind}.jsonl"),
            f"--{kind}_dataset.tokenizer.vocab_file",
            str(folder / "tokenizer.model"),
        )
    ]


def test_rows_as_they_are(tiny, capsys):
    status, text, _ = printed(capsys, "-n", "2", *tiny)
    assert status == 0
    assert text.count("--- sequence ") == 2 and text.count("--- document 1 of 1: ") == 2
    assert (
        len(re.findall(r"Question: What is the \w+\?«<\|assistant\|>»\[1\| ⏎\n The \w+ is \w+\.\]\[1\|«</s>»\]", text))
        == 2
    )
    assert len(re.findall(r"--- prediction: the prompt's \d+ tokens are those that prediction feeds", text)) == 2
    assert "--- padding: " in text and "\x1b[" not in text and "✂" not in text.partition("\n")[2]


def test_packed_rows_with_cuts_in_colour(tiny, capsys):
    status, text, _ = printed(
        capsys,
        "--rows",
        "1",
        "--color",
        "always",
        "--train_dataset.packing",
        "True",
        "--train_dataset.max_source_length=60",
        "--train_dataset.seq_length",
        "256",
        *tiny,
    )
    assert status == 0
    assert re.search(r"--- sequence 1: 3 documents, \d+ of 256 tokens", text)
    assert re.search(
        r"document 2 of 3: .*train.jsonl, line \d+: \d+ tokens, \d+ in the loss, weight 0\.1\d* each; "
        r"truncated from \d+ tokens",
        text,
    )
    assert "\x1b[1;31m✂ " in text and "\x1b[7m" in text
    assert len(re.findall("what differs is the truncation alone", text)) == 3


def test_the_evaluation_data(tiny, capsys):
    status, text, _ = printed(
        capsys, "-n", "1", "--dataset", "eval", "--num_samples", "1", "--eval_dataset.drop_remainder", "False", *tiny
    )
    assert status == 0 and "eval.jsonl, line 1: " in text


def test_a_chat_and_plain_text(tiny, capsys, tmp_path):
    chat, text = tmp_path / "chat.jsonl", tmp_path / "text.jsonl"
    chat.write_text(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            }
        )
    )
    text.write_text(json.dumps({"text": "The city is Oslo."}))
    more = ["-n", "1", "--train_dataset.drop_remainder", "False", "--train_dataset_dir"]
    status, found, _ = printed(capsys, *tiny, *more, str(chat))
    assert status == 0 and "[1|«<|user|>»]" in found and "tokens are those that prediction feeds" in found
    status, found, _ = printed(capsys, *tiny, *more, str(text))
    assert status == 0 and "prediction: plain text" in found and "[1| The city is Oslo.]" in found


def test_longbench_with_the_published_vocabulary(reference, capsys):
    status, text, _ = printed(
        capsys,
        "-n",
        "2",
        "--train_dataset_dir",
        str(reference / "longbench" / "data" / "2wikimqa.jsonl"),
        "--train_dataset.data_loader.prompt_config_file",
        str(reference / "longbench" / "dataset2prompt.json"),
        "--train_dataset.tokenizer.vocab_file",
        str(reference / "tokenizer" / "tokenizer.model"),
        "--model.model_config.padded_vocab_size",
        "65024",
        "--model.model_config.seq_length",
        "4096",
        "--train_dataset.max_source_length",
        "4000",
        "--train_dataset.max_target_length",
        "95",
        "--train_dataset.drop_remainder",
        "False",
    )
    assert status == 0
    assert len(re.findall(r"✂ \d+ tokens ✂", text)) == 2 and text.count("what differs is the truncation alone") == 2
    assert "prediction refuses it, for a prompt may have 4095 tokens" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["-n", "0"], "-n 0: at least one sequence"),
        (["--train_dataset_task.type", "KeyWordGenDataset"], "train_dataset_task.type: 'KeyWordGenDataset'"),
        (["--train_dataset.pakcing", "True"], "unknown key 'pakcing', did you mean 'packing'"),
        (["--model.model_config.padded_vocab_size", "100"], "set padded_vocab_size"),
    ],
)
def test_what_is_wrong_is_named(tiny, capsys, words, message):
    status, _, error = printed(capsys, *tiny, *words)
    assert status == 2 and message in error


def test_files_fields_and_what_is_not_used_are_named(tiny, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    alone = {"messages": [{"role": "assistant", "content": "Hello."}], "hint": "h"}
    (folder / "a.jsonl").write_text(json.dumps(alone) + "\n")
    (folder / "b.json").write_text(json.dumps([{"instruction": "What?", "input": "This.", "output": "That."}]))
    status, text, _ = printed(capsys, *tiny, "--train_dataset_dir", str(folder))
    assert status == 0 and "a.jsonl: 1 records, layout chat" in text and "b.json: 1 records, layout alpaca" in text
    assert "1 files are passed over" in text and "notes.txt (no data by its name)" in text
    assert "not used are 'hint' of 1 of 1 records" in text and "an answer to nothing" in text
    assert "«<|user|>» ⏎\n What?⏎\nThis.«<|assistant|>»[1| ⏎\n That.]" in text

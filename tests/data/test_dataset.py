"""The train_dataset and eval_dataset sections of the YAML, as MindFormers' trainer builds them."""

import copy
import json

import numpy as np
import pytest
from mindformers.dataset import build_dataset
from mindformers.tools.register import MindFormerConfig

from mindformers_glm32k.data import dataset as dataset_module
from mindformers_glm32k.data.dataset import GLM32KDataset, check_vocabulary, sequence_length
from mindformers_glm32k.data.loader import GLM32KDataLoader
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer


@pytest.fixture
def section(tmp_path, small_vocab_file):
    """The train_dataset section of a YAML, with ten rows of which number n has n + 1 times its words."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"content": f"q{n} " * (n + 1), "summary": f"a{n}"}) + "\n" for n in range(10)))
    return MindFormerConfig(
        data_loader={
            "type": "GLM32KDataLoader",
            "dataset_dir": str(path),
            "shuffle": False,
            "phase": "train",
            "version": 3,
            "origin_columns": ["content", "summary"],
        },
        tokenizer={"type": "GLM32KTokenizer", "vocab_file": str(small_vocab_file)},
        input_columns=["input_ids", "labels"],
        max_source_length=40,
        max_target_length=15,
        ignore_pad_token_for_loss=True,
        num_parallel_workers=2,
        python_multiprocessing=False,
        drop_remainder=True,
        batch_size=4,
        repeat=1,
        numa_enable=False,
        prefetch_size=1,
        seed=0,
    )


def batches(dataset):
    return list(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))


def questions(dataset, tokenizer):
    """The first word of each row's question."""
    return [tokenizer.decode(row[:20]).split("\n")[1].split()[0] for ids, _ in batches(dataset) for row in ids]


def test_the_trainers_way_of_building_gives_batches(section):
    before = copy.deepcopy(section)
    dataset = build_dataset({"type": "GLM32KDataset", "dataset_config": section})
    assert dataset.get_dataset_size() == 2
    for ids, labels in batches(dataset):
        assert ids.shape == labels.shape == (4, 56) and ids.dtype == labels.dtype == np.int32
    assert section == before, "the section is not changed: the trainer builds from it again"


def test_the_keys_that_mindformers_adds_are_taken(section):
    section.update(
        do_eval=True,
        auto_tune=False,
        filepath_prefix="./autotune",
        autotune_per_step=10,
        profile=False,
        micro_batch_num=1,
        output_columns=None,
        construct_args_key=["input_ids"],
        seq_length=64,
    )
    section.data_loader.update(num_samples=8, phase="eval")
    dataset = GLM32KDataset(section)
    assert dataset.get_dataset_size() == 2 and batches(dataset)[0][0].shape == (4, 64)


def test_processes_threads_repeats_and_remainders(section, small_vocab_file):
    tokenizer = GLM32KTokenizer(str(small_vocab_file))
    expected = batches(GLM32KDataset({**section, "drop_remainder": False}))
    assert [len(ids) for ids, _ in expected] == [4, 4, 2]
    for options in ({"python_multiprocessing": True}, {"tokenizer": tokenizer}, {"num_parallel_workers": 1}):
        found = batches(GLM32KDataset({**section, "drop_remainder": False, **options}))
        assert all((a == b).all() for one, two in zip(expected, found) for a, b in zip(one, two))
    assert GLM32KDataset({**section, "repeat": 3}).get_dataset_size() == 6


def test_ranks_share_the_rows(section, monkeypatch, small_vocab_file):
    tokenizer = GLM32KTokenizer(str(small_vocab_file))
    section.update(batch_size=2, drop_remainder=False)
    section.data_loader.shuffle = True
    seen = []
    for rank in range(2):
        monkeypatch.setattr(GLM32KDataset, "_generate_shard_info", classmethod(lambda cls, rank=rank: (rank, 2)))
        seen.append(questions(GLM32KDataset(section), tokenizer))
    assert [len(part) for part in seen] == [5, 5]
    assert sorted(seen[0] + seen[1]) == [f"q{n}" for n in range(10)]
    # semi-auto parallel with full_batch: every device is fed the whole global batch, in the order of one process
    monkeypatch.setattr(GLM32KDataset, "_generate_shard_info", classmethod(lambda cls: (None, None)))
    whole = questions(GLM32KDataset(section), tokenizer)
    assert whole[0::2] == seen[0] and whole[1::2] == seen[1]


def test_cuts_are_reported(section, monkeypatch):
    messages = []
    monkeypatch.setattr(dataset_module.logger, "warning", lambda text, *values: messages.append(text % values))
    section.update(max_source_length=20, drop_remainder=False)
    batches(GLM32KDataset(section))
    assert "to fit the sequence" in messages[0] and "train.jsonl, line" in messages[0]
    assert "of 10 samples" in messages[1] and "train.jsonl, line 10" in messages[1]


def test_more_workers_than_cores_are_no_error(section):
    assert GLM32KDataset({**section, "num_parallel_workers": 1000}).get_dataset_size() == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_source_lenght": 3}, "unknown key 'max_source_lenght', did you mean 'max_source_length'"),
        ({"max_source_length": None}, "max_source_length: None"),
        ({"max_target_length": "15"}, "max_target_length: '15'"),
        ({"seq_length": 55}, "seq_length=55 is smaller than max_source_length=40 \\+ max_target_length=15 \\+ 1"),
        ({"truncation": "centre"}, "truncation: 'centre' is not one of middle, left, right, longbench, drop"),
        ({"on_long_answer": "cut"}, "on_long_answer: 'cut' is not one of raise, drop"),
        ({"input_columns": ["input_ids"]}, "input_columns"),
        ({"ignore_pad_token_for_loss": False}, "ignore_pad_token_for_loss"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 11}, "10 records make no batch of batch_size=11"),
        ({"drop_remainder": "yes"}, "drop_remainder: 'yes'"),
        ({"seed": -1}, "seed: -1"),
        ({"tokenizer": None}, "tokenizer: missing"),
        ({"data_loader": None}, "data_loader: missing"),
    ],
)
def test_what_is_wrong_is_named(section, change, message):
    with pytest.raises(InputError, match=message):
        GLM32KDataset({**section, **change})


def test_a_bad_line_stops_the_run_before_it_starts(section):
    with open(section.data_loader.dataset_dir, "a", encoding="utf-8") as file:
        file.write('{"content": "q", "summ')
    with pytest.raises(InputError, match="train.jsonl: line 11: broken JSON.*cut off"):
        build_dataset({"type": "GLM32KDataset", "dataset_config": section})


def test_a_loader_may_be_given_instead_of_its_section(section):
    loader = GLM32KDataLoader(section.data_loader.dataset_dir, column_names=["sample"])
    found = batches(GLM32KDataset({**section, "data_loader": loader}))
    expected = batches(GLM32KDataset(section))
    assert (found[0][0] == expected[0][0]).all()
    with pytest.raises(InputError, match="column_names"):
        GLM32KDataset({**section, "data_loader": GLM32KDataLoader(section.data_loader.dataset_dir)})


def test_row_length():
    lengths = {"max_source_length": 30720, "max_target_length": 2047}
    assert sequence_length(lengths) == 32768
    assert sequence_length({**lengths, "seq_length": 40000}) == 40000
    with pytest.raises(InputError, match="seq_length=32767 is smaller"):
        sequence_length({**lengths, "seq_length": 32767})


def test_a_vocabulary_that_the_embedding_does_not_hold_is_refused(small_vocab_file):
    tokenizer = GLM32KTokenizer(str(small_vocab_file))
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    with pytest.raises(InputError, match=f"tokenizer.model has {tokenizer.vocab_size} ids"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)

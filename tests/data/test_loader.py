"""The data_loader section of the YAML."""

import json

import numpy as np
import pytest
from mindformers.dataset.dataloader import build_dataset_loader

from mindformers_glm32k.data.loader import EpochSampler, GLM32KDataLoader, StreamSampler, samples_of
from mindformers_glm32k.errors import InputError


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"content": f"q{n}", "summary": f"a{n}"}) + "\n" for n in range(10)))
    return str(path)


def rows(dataset, epochs=1):
    iterator = dataset.create_dict_iterator(num_epochs=epochs, output_numpy=True)
    return [[{name: value.item() for name, value in row.items()} for row in iterator] for _ in range(epochs)]


def test_mindformers_builds_it_from_the_yaml_section(data):
    dataset = build_dataset_loader(
        {
            "type": "GLM32KDataLoader",
            "dataset_dir": data,
            "shuffle": False,
            "phase": "train",
            "version": 3,
            "origin_columns": ["content", "summary"],
        }
    )
    assert dataset.get_dataset_size() == 10
    assert rows(dataset)[0][:2] == [{"prompt": "q0", "answer": "a0"}, {"prompt": "q1", "answer": "a1"}]
    assert len(samples_of(dataset)) == 10 and samples_of(object()) is None


def test_shuffling_depends_on_the_seed_alone(data):
    def prompts(**options):
        return [[row["prompt"] for row in epoch] for epoch in rows(GLM32KDataLoader(data, shuffle=True, **options), 2)]

    once = prompts(seed=1)
    assert once == prompts(seed=1) == prompts(seed=1, num_parallel_workers=2) != prompts(seed=2)
    assert once[0] != once[1] and sorted(once[0]) == sorted(once[1]) == [f"q{n}" for n in range(10)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_ranks_see_each_sample_once(data, shuffle):
    ranks = [rows(GLM32KDataLoader(data, shuffle=shuffle, num_shards=2, shard_id=rank), 3) for rank in range(2)]
    for first, second in zip(*ranks):
        assert len(first) == len(second) == 5
        assert sorted(row["prompt"] for row in first + second) == [f"q{n}" for n in range(10)]


def test_a_resumed_run_goes_on_with_the_next_sample(data):
    whole = rows(GLM32KDataLoader(data, shuffle=True), 3)
    resumed = GLM32KDataLoader(data, shuffle=True)
    resumed.set_init_step(13)  # as MindFormers' trainer does: one epoch and three samples are done
    iterator = resumed.create_dict_iterator(num_epochs=3, output_numpy=True)
    assert [[row["prompt"].item() for row in iterator] for _ in range(2)] == [
        [row["prompt"] for row in whole[1][3:]],
        [row["prompt"] for row in whole[2]],
    ]


def test_num_samples_and_other_columns(data):
    dataset = GLM32KDataLoader(data, shuffle=True, num_samples=3, column_names=["sample"])
    assert sorted(row["sample"] for row in rows(dataset)[0]) == [0, 1, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shufle": True}, "unknown key 'shufle', did you mean 'shuffle'"),
        ({"shuffle": "True"}, "data_loader.shuffle: 'True'"),
        (
            {"layout": "adgn"},
            "data_loader.layout: 'adgn' is not one of auto, adgen, longbench, sharegpt, openai, chat, alpaca, query, "
            "text",
        ),
        ({"on_error": "ignore"}, "data_loader.on_error: 'ignore' is not one of raise, skip"),
        ({"phase": "dev"}, "data_loader.phase"),
        ({"origin_columns": ["content"]}, "data_loader.origin_columns"),
        ({"origin_columns": "content"}, "data_loader.origin_columns"),
        ({"column_names": ["input_ids"]}, "data_loader.column_names"),
        ({"num_samples": 0}, "data_loader.num_samples: 0"),
        ({"num_shards": 2, "shard_id": 2}, "data_loader.shard_id: 2"),
        ({"num_shards": 11, "shard_id": 0}, "10 records are not enough for 11 ranks"),
        ({"origin_columns": ["question", "summary"]}, "train.jsonl: line 1: has the fields 'content', 'summary'"),
    ],
)
def test_wrong_options_are_named(data, options, message):
    with pytest.raises(InputError, match=message):
        GLM32KDataLoader(data, **options)


def test_through_mindformers_a_wrong_option_is_still_an_input_error(data):
    with pytest.raises(InputError, match="unknown key 'dataset_file'"):
        build_dataset_loader({"type": "GLM32KDataLoader", "dataset_dir": data, "dataset_file": data})


@pytest.fixture
def warnings(monkeypatch):
    from mindformers.tools.logger import logger

    lines = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_damaged_lines_may_be_skipped_and_are_told(data, warnings):
    with open(data, "a", encoding="utf-8") as file:
        file.write("broken\n")
    assert GLM32KDataLoader(data, on_error="skip").get_dataset_size() == 10
    assert len(warnings) == 1 and f"1 of 11 lines are damaged and skipped: {data}: line 11: broken JSON" in warnings[0]


def test_training_on_longbench_itself_is_said_loudly(tmp_path, warnings):
    record = {"input": "q", "context": "c", "answers": ["a"], "dataset": "trec"}
    (tmp_path / "trec.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "prompts.json").write_text(json.dumps({"trec": "{context} {input}", "mine": "{context}"}))
    options = {"prompt_config_file": str(tmp_path / "prompts.json")}
    GLM32KDataLoader(str(tmp_path / "trec.jsonl"), **options)
    GLM32KDataLoader(str(tmp_path / "trec.jsonl"), phase="eval", **options)
    assert not warnings, "to be evaluated on it is what it is there for"
    GLM32KDataLoader(str(tmp_path / "trec.jsonl"), phase="train", **options)
    GLM32KDataLoader(str(tmp_path / "trec.jsonl"), shuffle=True, **options)
    assert len(warnings) == 2 and all("TRAINED ON LONGBENCH'S TEST SET" in line for line in warnings)
    (tmp_path / "mine.jsonl").write_text(json.dumps({**record, "dataset": "mine"}) + "\n")
    GLM32KDataLoader(str(tmp_path / "mine.jsonl"), phase="train", **options)
    assert len(warnings) == 2


def test_texts_and_chats_have_no_columns_of_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "once"}\n')
    with pytest.raises(InputError, match="layout text have no columns prompt and answer; set train_dataset_task"):
        GLM32KDataLoader(str(tmp_path))
    assert GLM32KDataLoader(str(tmp_path), column_names=["sample"]).get_dataset_size() == 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_order_of_one_process(shuffle):
    alone = EpochSampler(12, shuffle, seed=3)
    ranks = [EpochSampler(12, shuffle, seed=3, num_shards=3, shard_id=rank) for rank in range(3)]
    for _ in range(4):
        whole, parts = list(alone), [list(rank) for rank in ranks]
        assert [sample for places in zip(*parts) for sample in places] == whole
        assert sorted(whole) == list(range(12))


def test_orders_change_with_epoch_and_seed_alone():
    first, second = (list(EpochSampler(50, True, seed=seed)) for seed in (0, 1))
    again = EpochSampler(50, True, seed=0)
    assert list(again) == first != second
    assert list(again) != first
    assert list(EpochSampler(5, False)) == [0, 1, 2, 3, 4]


def test_ranks_have_equally_many_samples_when_they_do_not_divide():
    ranks = [EpochSampler(11, True, num_shards=4, shard_id=rank) for rank in range(4)]
    for _ in range(3):
        parts = [list(rank) for rank in ranks]
        assert [len(part) for part in parts] == [2] * 4
        assert len({sample for part in parts for sample in part}) == 8
    assert ranks[0].get_num_samples() == 2


def test_samples_of_alike_sizes_come_together_and_each_once():
    sizes = np.random.default_rng(0).integers(0, 1000, 2003)
    for shuffle in (False, True):
        alone = EpochSampler(2003, shuffle, seed=1)
        alone.sort_by(sizes, 8)
        ranks = [EpochSampler(2003, shuffle, seed=1, num_shards=2, shard_id=rank) for rank in range(2)]
        for rank in ranks:
            rank.sort_by(sizes, 8)
        orders = []
        for _ in range(2):
            whole, parts = list(alone), [list(rank) for rank in ranks]
            assert sorted(whole) == list(range(2003))
            assert [sample for places in zip(*parts) for sample in places] == whole[:2002]
            spreads = np.ptp(sizes[np.reshape(whole[:2000], (-1, 8))], axis=1)
            assert spreads.mean() < 30 and (not shuffle or np.abs(np.diff(sizes[whole[:2000:8]])).mean() > 200)
            orders.append(whole)
        assert (orders[0] == orders[1]) is not shuffle


def test_a_streams_places_go_on_from_epoch_to_epoch():
    stream = StreamSampler(4)
    assert [list(stream), list(stream)] == [[0, 1, 2, 3], [4, 5, 6, 7]]

"""Every kind of layout that cannot work is refused with its key; those that ship are not."""

import copy

import pytest
import yaml
from dryrun.tiny import CONFIG, run_command

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import check_layout, layers_per_stage, layout_problems, virtual_stages

SHIPPED = sorted(CONFIG.parent.glob("*.yaml"))
PREDICT = {"run_mode": "predict", "parallel_config.pipeline_stage": 1, "parallel_config.micro_batch_num": 1}
ULYSSES = {"parallel_config.pipeline_stage": 1, "parallel_config.context_parallel_algo": "ulysses_cp"}


def changed(**dotted):
    """The shipped fine-tuning configuration with some values changed."""
    config = yaml.safe_load(CONFIG.read_text())
    for key, value in dotted.items():
        *sections, name = key.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[name] = value
    return config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_layouts_pass(path):
    config = yaml.safe_load(path.read_text())
    assert layout_problems(copy.deepcopy(config)) == []


@pytest.mark.parametrize(
    "values, names",
    [
        ({"parallel_config.data_parallel": 0}, ["parallel_config.data_parallel=0"]),
        ({"parallel_config.micro_batch_num": "many"}, ["parallel_config.micro_batch_num='many'"]),
        ({"micro_batch_interleave_num": 0}, ["micro_batch_interleave_num=0"]),
        ({"runner_config.batch_size": -1}, ["runner_config.batch_size=-1"]),
        ({"parallel.parallel_mode": 0}, ["parallel.parallel_mode=0", "pipeline_stage"]),
        (
            {"parallel_config.model_parallel": 3},
            [
                "model_config.num_attention_heads=32",
                "padded_vocab_size=65024",
                "ffn_hidden_size=13696",
                "hidden_size=4096",
                "multi_query_group_num=2",
            ],
        ),
        ({"parallel_config.context_parallel": 64, **ULYSSES}, ["model_config.num_attention_heads=32", "= 64"]),
        (
            {"parallel_config.model_parallel": 4, "model.model_config.padded_vocab_size": 65022},
            ["model_config.padded_vocab_size=65022"],
        ),
        (
            {"parallel_config.model_parallel": 2, "model.model_config.mlp_chunk_size": 4096},
            ["model_config.mlp_chunk_size=4096", "model_parallel 1"],
        ),
        (
            {"parallel.parallel_optimizer_config": {"optimizer_level": "level3", "optimizer_weight_shard_size": 1}},
            ["parallel.parallel_optimizer_config.optimizer_weight_shard_size=1", "level3"],
        ),
        (
            {
                "parallel.parallel_optimizer_config": {"optimizer_level": "level3"},
                "model.model_config.mlp_chunk_size": 4096,
                "runner_config.gradient_accumulation_steps": 2,
            },
            ["model_config.mlp_chunk_size=4096: null to accumulate", "level3"],
        ),
        ({"parallel_config.context_parallel": 3}, ["model_config.seq_length=32768", "context_parallel = 3"]),
        ({"model.model_config.seq_length": 32760}, ["model_config.seq_length=32760", "16"]),
        (
            {"model.model_config.use_flash_attention": False, "parallel_config.context_parallel": 2},
            ["model_config.use_flash_attention"],
        ),
        ({"parallel_config.context_parallel": 2, "micro_batch_interleave_num": 2}, ["micro_batch_interleave_num=2"]),
        ({"parallel.dataset_strategy": [[4, 1], [4, 1]]}, ["parallel.dataset_strategy", "data_parallel=2"]),
        ({"parallel_config.pipeline_stage": 8}, ["model_config.num_layers=28", "pipeline_stage=8", "add up to 4"]),
        ({"model.model_config.offset": [1, 1, 0, 0]}, ["model_config.num_layers=28", "= 30 layers"]),
        ({"model.model_config.offset": [1, 0, -1]}, ["model_config.offset=[1, 0, -1]", "pipeline_stage is 4"]),
        ({"model.model_config.offset": [7, 0, 0, -7]}, ["a stage of [[14, 7, 7, 0]] has no layer"]),
        ({"parallel_config.micro_batch_num": 3}, ["parallel_config.micro_batch_num=3", "pipeline_stage=4"]),
        ({"runner_config.gradient_accumulation_steps": 2}, ["runner_config.gradient_accumulation_steps=2"]),
        ({**PREDICT, "model.model_config.batch_size": 3}, ["model_config.batch_size=3", "data_parallel=2"]),
        ({**PREDICT, "parallel_config.pipeline_stage": 2}, ["parallel_config.pipeline_stage=2", "predict"]),
        (
            {
                **PREDICT,
                "model.model_config.use_past": True,
                "parallel_config.data_parallel": 1,
                "parallel_config.model_parallel": 4,
            },
            ["multi_query_group_num=2", "cache"],
        ),
        (
            {**PREDICT, "model.model_config.use_past": True, "model.model_config.batch_size": 2},
            ["parallel_config.data_parallel=2: must be 1", "use_past"],
        ),
    ],
    ids=lambda value: ",".join(value)[:60],
)
def test_what_does_not_fit_is_named(values, names):
    with pytest.raises(InputError) as error:
        check_layout(changed(**values))
    for name in names:
        assert name in str(error.value)


def test_the_number_of_npus_must_be_the_layouts():
    assert layout_problems(changed(), devices=8) == []
    (found,) = layout_problems(changed(), devices=16)
    assert "data_parallel 2 x model_parallel 1 x context_parallel 1 x pipeline_stage 4 = 8 NPUs" in found
    assert "the run has 16" in found
    (found,) = layout_problems(changed(use_parallel=False), devices=8)
    assert "use_parallel" in found


def test_without_use_parallel_the_layout_is_not_looked_at():
    assert layout_problems(changed(**{"use_parallel": False, "parallel_config.model_parallel": 3})) == []


def test_layers_are_dealt_as_upstream_deals_them():
    assert layers_per_stage(changed()) == [[7, 7, 7, 7]]
    assert layers_per_stage(changed(**{"model.model_config.offset": [1, 0, 0, -1]})) == [[8, 7, 7, 6]]
    interleaved = {
        "model.model_config.pp_interleave_num": 2,
        "parallel.pipeline_config": {"pipeline_interleave": True},
        "model.model_config.offset": [[0, 1, 1, 1], [1, 0, 0, 0]],
    }
    assert layers_per_stage(changed(**interleaved)) == [[3, 4, 4, 4], [4, 3, 3, 3]]
    assert virtual_stages(changed(**interleaved)) == 2
    # upstream leaves pp_interleave_num aside where the pipeline does not interleave: 28 layers on 4 stages are even
    alone = changed(**{"model.model_config.pp_interleave_num": 2})
    assert virtual_stages(alone) == 1 and layers_per_stage(alone) == [[7, 7, 7, 7]] and layout_problems(alone) == []
    assert (
        layout_problems(changed(**{"parallel_config.pipeline_stage": 3, "model.model_config.offset": [1, 0, 0]})) == []
    )


@pytest.mark.parametrize("command, folder", [("dryrun", "--output_dir"), ("strategy", "--output")])
def test_commands_refuse_before_they_compile(tmp_path, command, folder):
    result = run_command(command, folder, str(tmp_path / "out"), "--devices", "16", parallel_config__micro_batch_num=2)
    assert result.returncode == 2
    assert "micro_batch_num=2" in result.stderr and "the run has 16" in result.stderr
    assert "rank 0" not in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "algorithm, degree, words",
    [
        ("ulysses_cp", 1, None),
        ("hybrid_cp", 2, None),
        ("colossalai_cp", 1, "set context_parallel_algo: ulysses_cp with ulysses_degree_in_cp: 2"),
    ],
)
def test_packed_rows_need_all_positions_of_a_row(algorithm, degree, words):
    values = {
        "parallel_config.pipeline_stage": 1,
        "parallel_config.context_parallel": 2,
        "parallel_config.context_parallel_algo": algorithm,
        "parallel_config.ulysses_degree_in_cp": degree,
    }
    assert layout_problems(changed(**values)) == []
    found = layout_problems(changed(**values, **{"train_dataset.packing": True}))
    assert len(found) == (words is not None)
    assert all("context_parallel_algo='colossalai_cp'" in sentence and sentence.endswith(words) for sentence in found)
    assert (
        layout_problems(changed(**values, **{"train_dataset.packing": True, "model.model_config.cells": "portable"}))
        == []
    )


def test_packed_rows_of_a_device_fit_into_one_call():
    found = layout_problems(
        changed(
            **{
                "train_dataset.packing": True,
                "runner_config.batch_size": 4,
                "model.model_config.documents_per_row": 300,
            }
        )
    )
    assert any(
        sentence.startswith("model_config.documents_per_row=300") and "255 is the most" in sentence
        for sentence in found
    )

"""The settings of a search: all NPUs, the trainer's checks, keys that say all of it."""

from dataclasses import replace

import pytest

from dryrun.search.invented import card
from mindformers_glm32k.dryrun.search import space
from mindformers_glm32k.dryrun.search.space import RECOMPUTE, Setting, applied, settings
from mindformers_glm32k.parallel import layers_per_stage, layout_problems


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 64])
def test_every_setting_uses_all_devices_and_passes_the_checks(devices):
    found = list(settings(card(), devices, 16))
    assert found and len(set(found)) == len(found)
    for setting in found:
        assert setting.devices == devices and setting.rows <= 16 and sum(setting.layers) == 28
        assert layout_problems(applied(card(), setting.keys()), devices) == []


def test_the_checks_are_the_trainers_own(monkeypatch):
    monkeypatch.setattr(space, "layout_problems", lambda config, devices: ["no"])
    assert list(settings(card(), 8, 16)) == []


def test_what_the_checks_refuse_is_left_out():
    odd = applied(card(), {"model.model_config.num_attention_heads": 4})
    assert all(one.model_parallel * one.context_parallel <= 4 for one in settings(odd, 8, 16))
    assert not any(one.mlp_chunk for one in settings(card(), 8, 16) if one.context_parallel > 1)


def test_the_axes_that_are_looked_at():
    found = list(settings(card(), 8, 16))
    axes = {(one.data_parallel, one.model_parallel, one.context_parallel, one.pipeline_stage) for one in found}
    assert {(8, 1, 1, 1), (1, 1, 8, 1), (4, 1, 2, 1), (2, 1, 1, 4), (1, 4, 1, 2)} <= axes
    assert {one.recompute for one in found} == set(RECOMPUTE)
    assert {one.sequences for one in found if one.data_parallel == 8} == {1, 2}
    assert {one.layers for one in found if one.pipeline_stage == 4} == {(7, 7, 7, 7), (6, 7, 8, 7), (7, 8, 7, 6)}


def test_only_pipelines_have_virtual_stages():
    found = list(settings(card(), 8, 16))
    assert any(one.interleave > 1 for one in found)
    assert all(one.pipeline_stage > 1 and min(one.layers) >= one.interleave for one in found if one.interleave > 1)


@pytest.mark.parametrize(
    "layers, offset",
    [
        ((7, 7, 7, 7), [[1, 1, 1, 1], [0, 0, 0, 0]]),
        ((6, 7, 8, 7), [[0, 1, 1, 1], [0, 0, 1, 0]]),
        ((8, 8, 6, 6), [[1, 1, 0, 0], [1, 1, 0, 0]]),
    ],
)
def test_virtual_stages_in_the_yaml(layers, offset):
    setting = Setting(2, 1, 1, 4, 8, layers, interleave=2)
    config = applied(card(), setting.keys())
    model = config["model"]["model_config"]
    assert model["offset"] == offset and model["pp_interleave_num"] == 2
    assert config["parallel"]["pipeline_config"] == {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}
    assert [sum(stage) for stage in zip(*layers_per_stage(config))] == list(layers)
    even = applied(card(), Setting(4, 1, 1, 2, 4, (14, 14), interleave=2).keys())
    assert even["model"]["model_config"]["offset"] == 0
    plain = applied(card(), Setting(2, 1, 1, 4, 8, layers).keys())
    assert "pipeline_config" not in plain["parallel"] and plain["model"]["model_config"]["pp_interleave_num"] == 1


def test_chunks_of_other_sizes():
    setting = Setting(8, layers=(28,), recompute="mlp", mlp_chunk=space.MLP_CHUNK)
    found = list(setting.resized(32768, 2048))
    assert [(one.mlp_chunk, one.loss_chunk) for one in found] == [
        (4096, 1024),
        (4096, 4096),
        (2048, None),
        (8192, None),
    ]
    assert all(one.usual == setting for one in found)
    assert len({one.name for one in (*found, setting)}) == 5
    assert applied(card(), found[0].keys())["model"]["model_config"]["loss_chunk_size"] == 1024
    assert "loss_chunk_size" not in applied(card(), setting.keys())["model"]["model_config"]
    # a rank of Ulysses has no more tokens than that in all; without chunks the MLP has no other size
    ulysses = Setting(1, 1, 8, 1, 16, (28,), "none")
    assert [one.loss_chunk for one in ulysses.resized(32768, 4096)] == [1024]
    assert [one.loss_chunk for one in ulysses.resized(8192, 2048)] == []


def test_adapters_have_no_gradients_to_share_out():
    lora = applied(card(), {"model.model_config.pet_config": {"pet_type": "lora"}})
    assert not any(one.level > 1 for one in settings(lora, 8, 16))


def test_keys_say_what_a_setting_is():
    setting = Setting(2, 1, 1, 4, 8, (6, 7, 8, 7), "mlp", (2, 0, 0, 1), level=2)
    config = applied(card(), setting.keys("dfs"))
    assert config["context"]["exec_order"] == "dfs"
    assert config["model"]["model_config"]["offset"] == [-1, 0, 1, 0]
    assert config["recompute_config"]["recompute"] == [2, 0, 0, 1]
    assert config["recompute_config"]["select_recompute"] == RECOMPUTE["mlp"]
    assert config["parallel"]["parallel_optimizer_config"] == {"optimizer_level": "level2"}
    assert config["parallel_config"]["micro_batch_num"] == 8
    assert config["runner_config"]["gradient_accumulation_steps"] == 1
    mixed = applied(card(), Setting(8, layers=(28,), recompute="cheap", recomputed=(5,)).keys())["recompute_config"]
    assert mixed["recompute"] is False
    assert mixed["select_recompute"] == {**dict.fromkeys(RECOMPUTE["cheap"], True), "mlp": [5]}
    ulysses = applied(card(), Setting(1, 1, 8, 1, 16, (28,)).keys())
    assert ulysses["runner_config"]["gradient_accumulation_steps"] == 16
    assert ulysses["parallel_config"]["ulysses_degree_in_cp"] == 8 and ulysses["parallel"]["enable_alltoall"] is True
    assert applied(card(), Setting(layers=(28,)).keys())["use_parallel"] is False


def test_applied_leaves_the_original_alone():
    config = card()
    changed = applied(config, {"new.section.key": 1, "context.exec_order": "bfs"})
    assert changed["new"]["section"]["key"] == 1
    assert config == card()


def test_settings_of_a_family_differ_in_layers_and_sequences_only():
    setting = Setting(2, 1, 1, 4, 16, (6, 7, 8, 7), "cheap", (2, 0, 0, 1))
    assert setting.family == replace(setting, layers=(), recomputed=(), sequences=8)
    assert Setting(8, sequences=1).family.sequences == 1


def test_names_are_different():
    found = list(settings(card(), 8, 16))
    assert len({one.name for one in found}) == len(found)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(8, 1, 1, 1, 1, (28,), "cheap", (19,), 4096, 3),
        Setting(1, 1, 8, 1, 16, (28,), "none"),
        Setting(2, 1, 1, 4, 8, (6, 7, 8, 7), "mlp", (2, 0, 0, 1), level=2),
        Setting(1, 4, 1, 2, 16, (14, 14)),
        Setting(layers=(28,)),
        Setting(2, 1, 1, 4, 8, (6, 7, 8, 7), loss_chunk=1024, interleave=2),
    ],
    ids=lambda setting: setting.name,
)
def test_the_preflight_finds_nothing_wrong_with_the_keys(setting):
    from mindformers_glm32k.preflight import all_findings

    config = applied(card(), setting.keys("dfs"))
    assert [finding.line() for finding in all_findings(config, "finetune") if finding.severity == "error"] == []

"""Small models that keep the layout."""

import pytest
import yaml

from dryrun.tiny import CONFIG
from mindformers_glm32k.dryrun.simulator import scale_down
from mindformers_glm32k.parallel import layout_problems

PREDICTION = sorted(path.stem for path in CONFIG.parent.glob("predict_*.yaml") if "tiny" not in path.stem)
TRAINING = sorted(path.stem for path in CONFIG.parent.glob("finetune_*.yaml") if "tiny" not in path.stem)


def config_of(name, **model):
    config = yaml.safe_load(CONFIG.with_name(f"{name}.yaml").read_text())
    config["model"]["model_config"].update(model)
    return config


def applied(config, plan):
    for key, (_, value) in plan.changes.items():
        *sections, leaf = key.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[leaf] = value
    return config


@pytest.mark.parametrize("name", TRAINING)
def test_every_shipped_layout_still_fits_its_small_model(name):
    config = config_of(name)
    plan = scale_down.plan(config)
    small = applied(config, plan)
    assert layout_problems(small) == []
    model = small["model"]["model_config"]
    assert scale_down.num_weights(model) < 5e6 and model["seq_length"] <= 256
    assert model["hidden_size"] == model["num_attention_heads"] * model["kv_channels"]
    dataset = small["train_dataset"]
    assert dataset["max_source_length"] + dataset["max_target_length"] + 1 == model["seq_length"]
    run = model["seq_length"] // small["parallel_config"].get("context_parallel", 1)
    assert 1 < run // model["loss_chunk_size"] <= 4  # the loss is still computed in several chunks
    assert model.get("mlp_chunk_size", 1) < run


def test_the_offset_of_the_stages_stays():
    config = config_of("finetune_glm32k", offset=[1, 1, 0, -2])
    assert scale_down.plan(config).changes["model.model_config.num_layers"] == [28, 12]  # 4 + 4 + 3 + 1


def test_small_models_are_left_as_they_are():
    tiny = {
        "num_layers": 4,
        "hidden_size": 64,
        "kv_channels": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 160,
        "padded_vocab_size": 1024,
    }
    plan = scale_down.plan(config_of("finetune_glm32k", seq_length=64, **tiny))
    assert plan.changes == {}
    assert plan.overrides == ["--parallel.parallel_optimizer_config", "{'parallel_optimizer_threshold': 0}"]
    assert set(scale_down.plan(config_of("finetune_glm32k", **tiny)).changes) == {
        "model.model_config.seq_length",
        "model.model_config.loss_chunk_size",
        "train_dataset.max_source_length",
        "train_dataset.max_target_length",
    }


def test_scaling_down_can_be_refused():
    assert scale_down.plan(config_of("finetune_glm32k"), wanted=False).changes == {}


def test_sizes_of_a_checkpoint_are_taken_over(reference):
    plan = scale_down.plan(config_of("finetune_glm32k"), checkpoint=reference / "tiny_hf" / "hf_safetensors_fp32")
    new = {key.rsplit(".", 1)[-1]: value for key, (_, value) in plan.changes.items()}
    assert (
        new["num_layers"],
        new["hidden_size"],
        new["kv_channels"],
        new["num_attention_heads"],
        new["ffn_hidden_size"],
        new["padded_vocab_size"],
    ) == (3, 64, 16, 4, 160, 1024)


def test_dropout_is_off():
    assert scale_down.plan(config_of("finetune_glm32k_lora"), wanted=False).changes == {
        "model.model_config.pet_config.lora_dropout": [0.1, 0.0]
    }


def test_weights_are_counted():
    assert 6.2e9 < scale_down.num_weights(config_of("finetune_glm32k")["model"]["model_config"]) < 6.3e9


@pytest.mark.parametrize("name", PREDICTION)
def test_prediction_keeps_a_cache_of_several_blocks_a_prompt(name):
    config = config_of(name, batch_size=2)
    small = applied(config, scale_down.plan(config))
    assert layout_problems(small) == [] and scale_down.predicts(small)
    model = small["model"]["model_config"]
    assert scale_down.num_weights(model) < 5e6
    assert 1 < model["max_new_tokens"] < model["seq_length"] <= 256
    assert model["seq_length"] % model["block_size"] == 0 and model["seq_length"] // model["block_size"] > 2
    assert 2 * model["seq_length"] <= model["num_blocks"] * model["block_size"] <= 1024


def test_kernels_of_16_bits_leave_everything_else_in_float32():
    options = scale_down.precision_overrides("float32", "float16")
    values = dict(zip(options[::2], options[1::2]))
    assert values.pop("--model.model_config.compute_dtype") == "float16"
    assert set(values.values()) == {"float32"} and "--model.model_config.rotary_dtype" in values

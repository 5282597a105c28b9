"""Every shipped training layout, and others, simulated: all ranks' programs beside one device's on the same sequences.
Minutes each: `python -m pytest -m rehearsal`."""

import json

import pytest

from dryrun.tiny import CONFIG, run_command

pytestmark = pytest.mark.rehearsal
# name -> (YAML, overrides); as few micro batches as each pipeline allows, so that it compiles sooner
LAYOUTS = {
    "card: dp 2 x pp 4": ("finetune_glm32k", {"parallel_config__micro_batch_num": 4}),
    "less memory: dp 2 x pp 4": ("finetune_glm32k_32gb", {"parallel_config__micro_batch_num": 4}),
    "cp 8 (Ulysses)": ("finetune_glm32k_cp8", {}),
    "mp 4 x pp 2": ("finetune_glm32k_mp4", {"parallel_config__micro_batch_num": 4}),
    "dp 2 x mp 4": (
        "finetune_glm32k_mp4",
        {
            "parallel_config__data_parallel": 2,
            "parallel_config__pipeline_stage": 1,
            "parallel_config__micro_batch_num": 1,
        },
    ),
    "16 cards": ("finetune_glm32k_16p", {"parallel_config__micro_batch_num": 4}),
    "LoRA on 8": ("finetune_glm32k_lora", {"parallel_config__micro_batch_num": 4}),
    "LoRA on 1": ("finetune_glm32k_lora_1p", {}),
    "fastest: dp 8": ("finetune_glm32k_fast", {}),
    "fastest with less memory: dp 8": ("finetune_glm32k_fast_32gb", {}),
    "fastest on 16 cards: dp 16": ("finetune_glm32k_fast_16p", {}),
    "dp 2 x mp 2 x pp 2": (
        "finetune_glm32k",
        {
            "parallel_config__model_parallel": 2,
            "parallel_config__pipeline_stage": 2,
            "parallel_config__micro_batch_num": 2,
        },
    ),
    "cp 4 (Ulysses)": (
        "finetune_glm32k_cp8",
        {"parallel_config__context_parallel": 4, "parallel_config__ulysses_degree_in_cp": 4},
    ),
    "uneven pipeline": (
        "finetune_glm32k",
        {
            "parallel_config__data_parallel": 1,
            "parallel_config__pipeline_stage": 2,
            "parallel_config__micro_batch_num": 2,
            "model__model_config__offset": "[1,-1]",
        },
    ),
    "dp 2, no optimizer sharding": (
        "finetune_glm32k",
        {
            "parallel_config__pipeline_stage": 1,
            "parallel_config__micro_batch_num": 1,
            "parallel__enable_parallel_optimizer": False,
        },
    ),
    "gradient accumulation": (
        "finetune_glm32k",
        {
            "parallel_config__pipeline_stage": 1,
            "parallel_config__micro_batch_num": 1,
            "runner_config__gradient_accumulation_steps": 2,
        },
    ),
    "interleaved micro batches": (
        "finetune_glm32k",
        {
            "parallel_config__data_parallel": 1,
            "parallel_config__model_parallel": 2,
            "parallel_config__pipeline_stage": 1,
            "parallel_config__micro_batch_num": 1,
            "micro_batch_interleave_num": 2,
        },
    ),
}


def simulate(output, name, *options, **overrides):
    yaml, layout = LAYOUTS[name]
    return run_command(
        "dryrun",
        "--execute",
        "5",
        "--output_dir",
        str(output),
        *options,
        config=CONFIG.with_name(f"{yaml}.yaml"),
        sizes={},
        **{**layout, **overrides},
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_device(tmp_path, name):
    result = simulate(tmp_path, name)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "execution.json").read_text())
    assert report["agrees"] and len(report["steps"]) == 5
    for step in report["steps"]:
        assert step["loss"] == pytest.approx(step["loss_one_device"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(step["grad_norm_one_device"], rel=1e-5)
        assert not step["overflow"]
    assert report["largest_moment_difference_relative"] < 1e-5
    assert report["largest_weight_difference_relative"] < 1e-5
    ranks = [path.name for path in sorted((tmp_path / "checkpoint").iterdir())]
    assert len(ranks) == report["world_size"]


def test_the_same_steps_are_skipped_in_half_precision(tmp_path):
    result = simulate(
        tmp_path, "uneven pipeline", "--precision", "float16", runner_wrapper__scale_sense__loss_scale_value=2**20
    )
    report = json.loads((tmp_path / "execution.json").read_text())
    overflows = [step["overflow"] for step in report["steps"]]
    assert overflows == [step["overflow_one_device"] for step in report["steps"]]
    assert overflows[0] and not overflows[-1]
    assert report["non_finite"] and "float16" in report["non_finite"][0]["output"]
    assert result.returncode == 0, result.stdout

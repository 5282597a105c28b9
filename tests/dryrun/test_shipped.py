"""Every shipped YAML for NPUs compiles for every stage, at small size, and keeps what it promises."""

import json

import pytest
import yaml

from dryrun.tiny import CONFIG, run_dryrun

SHIPPED = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONFIG.parent.glob("*.yaml"))}
SHIPPED = {name: config for name, config in SHIPPED.items() if config["context"]["device_target"] == "Ascend"}
# several stages or two graphs each: the tests of analysis, strategy and prediction compile smaller ones of their kind
LONG = {
    "finetune_glm32k",
    "finetune_glm32k_16p",
    "finetune_glm32k_32gb",
    "finetune_glm32k_fast_16p",
    "finetune_glm32k_fast_32gb",
    "finetune_glm32k_lora",
    "finetune_glm32k_mp4",
    "predict_glm32k_mp2",
}
HEADS = 8  # for eight ranks of Ulysses


def small(config):
    """Overrides beside those of `tiny`, with at least one layer on each stage."""
    parallel = config["parallel_config"] if config["use_parallel"] else {}
    stages = parallel.get("pipeline_stage", 1)
    offset = config["model"]["model_config"].get("offset") or 0
    offset = offset if isinstance(offset, list) else [offset] * stages
    overrides = {
        "model__model_config__num_layers": stages * (1 - min(min(offset), 0)) + sum(offset),
        "model__model_config__num_attention_heads": HEADS,
        "model__model_config__hidden_size": 16 * HEADS,
    }
    if stages > 1:
        overrides["parallel_config__micro_batch_num"] = stages
    if config["run_mode"] == "predict":
        overrides.update(model__model_config__num_blocks=16, model__model_config__max_new_tokens=8)
    return stages, overrides


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.rehearsal) if name in LONG else name for name in SHIPPED]
)
def test_every_stage_compiles(tmp_path, name):
    config = SHIPPED[name]
    stages, overrides = small(config)
    result = run_dryrun(tmp_path, config=CONFIG.with_name(f"{name}.yaml"), **overrides)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    phases = ["prefill", "increment"] if config["run_mode"] == "predict" else ["train"]
    assert [(program["stage"], program["phase"]) for program in report["programs"]] == [
        (stage, phase) for stage in range(stages) for phase in phases
    ]
    compute = config["model"]["model_config"]["compute_dtype"]
    for program in report["programs"]:
        assert program["doubts"] == []
        assert program["square_tensors"] == [] and program["large_constants"] == []
        for item in program["collectives"]:
            assert len(item["group_ranks"]) > 1, item
            assert item["kind"] not in ("Send", "Receive") or item["dtype"] == compute, item
    assert (tmp_path / "report.md").exists() and (tmp_path / "report.png").exists()
    if config["use_parallel"]:
        assert len(list((tmp_path / "strategy").iterdir())) == stages

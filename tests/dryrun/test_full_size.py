"""Shipped training layouts at full size: 28 layers, hidden 4096, 32768 tokens.

Minutes each: `python -m pytest -m rehearsal`.
"""

import json

import pytest
import yaml

from dryrun.tiny import CONFIG, run_command

pytestmark = pytest.mark.rehearsal
# YAML -> GiB that no card may need, options
LAYOUTS = {
    "finetune_glm32k": (36, ()),
    "finetune_glm32k_32gb": (24, ()),
    "finetune_glm32k_fast": (57, ()),
    "finetune_glm32k_fast_32gb": (27, ("--quick",)),
    "finetune_glm32k_cp8": (36, ("--quick",)),  # 28 layers in one program take 10 GB and minutes to compile
    "finetune_glm32k_mp4": (59, ("--quick",)),
    "finetune_glm32k_16p": (59, ("--rank", "0")),
    "finetune_glm32k_lora": (59, ("--rank", "0")),
    "finetune_glm32k_lora_1p": (59, ("--quick",)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_at_full_size(tmp_path, name):
    most, options = LAYOUTS[name]
    path = CONFIG.with_name(f"{name}.yaml")
    result = run_command("dryrun", "--output_dir", str(tmp_path), *options, config=path, sizes={})
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    allowed = int(yaml.safe_load(path.read_text())["context"]["max_device_memory"].removesuffix("GB")) * 2**30
    for program in report["programs"]:
        # without a pipeline the order is the scheduler's, not the file's
        order = "bfs" if name.startswith("finetune_glm32k_fast") else "file"
        assert program["total_bytes_by_order"][order] < min(most * 2**30, allowed)
        assert program["square_tensors"] == [] and program["large_constants"] == [] and program["doubts"] == []
        assert program["peak_rss_bytes"] < 12 * 10**9
    assert report["warnings"] == []

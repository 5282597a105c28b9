"""Virtual stages as the compiler makes them: the closed form counts what crosses their boundaries."""

import json

import pytest
import yaml

from dryrun.search.invented import card
from dryrun.tiny import OVERRIDES, SHARDED, run_dryrun
from mindformers_glm32k.dryrun.search.figures import figures_of
from mindformers_glm32k.dryrun.search.model import Dims, Model
from mindformers_glm32k.dryrun.search.space import Setting, applied

SETTING = Setting(1, 1, 1, 2, 4, (2, 2), loss_chunk=16, interleave=2)


def test_the_compiler_makes_virtual_stages_of_the_keys(tmp_path):
    config = applied(card(), {**OVERRIDES, "model.model_config.num_layers": 4, **SETTING.keys()})
    path = tmp_path / "interleaved.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    result = run_dryrun(tmp_path / "out", config=path, model__model_config__num_layers=4, **SHARDED)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["layout_sizes"]["interleave"] == 2 and report["layout_sizes"]["stages"] == 2
    form = Model(Dims.of(config))
    for program in report["programs"]:
        assert program["doubts"] == []
        found = figures_of(program)
        guess = form.closed_form(SETTING, program["stage"], 2)
        for what in ("bytes", "count"):
            key = ("collective", "Receive", (0, 1), False, what)
            assert found[key] == guess[key]
        assert found["matmul", "float16"] == pytest.approx(guess["matmul", "float16"], rel=0.1)


@pytest.mark.slow
def test_few_layers_tell_of_all_with_virtual_stages(tmp_path):
    keys = {**SETTING.keys(), "model.model_config.num_layers": 12, "model.model_config.offset": 0}
    path = tmp_path / "interleaved.yaml"
    path.write_text(yaml.safe_dump(applied(card(), {**OVERRIDES, **keys})), encoding="utf-8")
    reports = []
    for options in ((), ("--quick",)):
        result = run_dryrun(tmp_path / "out", *options, config=path, model__model_config__num_layers=12, **SHARDED)
        assert result.returncode == 0, result.stderr
        reports.append(json.loads((tmp_path / "out" / "report.json").read_text())["programs"])
    for whole, guess in zip(*reports):
        assert guess["extrapolated"] == {"from_layers": [2, 4], "to_layers": 6}
        for key in ("total_bytes_by_order", "parameter_bytes", "optimizer_bytes", "work"):
            assert guess[key] == whole[key], key
        counts = [
            [(item["kind"], item["count"], item["bytes"]) for item in one["collectives"]] for one in (whole, guess)
        ]
        assert counts[0] == counts[1]

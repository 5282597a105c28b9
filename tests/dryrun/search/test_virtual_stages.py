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

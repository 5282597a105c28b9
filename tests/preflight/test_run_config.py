"""The layout of a run before anything is built; the other checks are tested with the trainer and the shipped YAMLs."""

import mindspore.communication
import pytest
from conftest import ROOT
from mindformers.tools.register import MindFormerConfig

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.preflight import check_run_layout

FOLDER = ROOT / "research" / "glm32k"


@pytest.mark.parametrize(
    "mode, refused_words", [(1, "pipeline_stage"), ("semi_auto_parallel", "pipeline_stage"), (0, None)]
)
def test_layouts_that_cannot_work_are_refused_before_the_run(monkeypatch, mode, refused_words):
    config = MindFormerConfig(str(FOLDER / "finetune_glm32k.yaml"))
    config.parallel.parallel_mode = mode
    config.parallel_config.pipeline_stage = 5
    monkeypatch.setattr(mindspore.communication, "get_group_size", lambda: 10)
    if refused_words is None:  # data parallel: every device holds all of it, whatever parallel_config says
        check_run_layout(config)
        return
    with pytest.raises(InputError, match=refused_words):
        check_run_layout(config)
    config.parallel_config.pipeline_stage = 4
    with pytest.raises(InputError, match="= 8 NPUs, the run has 10"):
        check_run_layout(config)

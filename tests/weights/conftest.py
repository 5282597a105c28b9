"""Strategies compiled once per session, and MindSpore's transform_checkpoints without a process of its own."""

import mindspore
import pytest
from dryrun.tiny import run_command

from mindformers_glm32k.weights import reshard
from weights.parallel import CASES, whole_tensors, write_checkpoint


@pytest.fixture(scope="session")
def compiled_split(tmp_path_factory):
    """A function: name of a case -> (folder that `glm32k split` made, the whole checkpoint that it cut)."""
    done = {}

    def split(name):
        if name not in done:
            folder, case = tmp_path_factory.mktemp(name), CASES[name]
            adapters = name == "lora"
            whole = write_checkpoint(folder / "whole.ckpt", whole_tensors(case.sizes, adapters=adapters))
            result = run_command(
                "split",
                "--load_checkpoint",
                str(whole),
                "--output",
                str(folder / "parts"),
                config=case.config,
                **case.overrides,
            )
            assert result.returncode == 0, result.stderr
            done[name] = folder / "parts", whole, result
        return done[name]

    return split


@pytest.fixture
def in_process(monkeypatch):
    """The same function of MindSpore, called here: importing MindSpore takes longer than what tests cut."""

    def run(self, source, target, split_by=None, merged_from=None):
        paths = [path and str(path) for path in (merged_from, split_by)]
        mindspore.transform_checkpoints(str(source), str(target), "checkpoint_", *paths)

    monkeypatch.setattr(reshard.Transformer, "run", run)

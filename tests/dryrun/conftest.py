"""Tiny programs, compiled once per session for all tests of the dry run."""
import json

import pytest

from dryrun.tiny import run_dryrun


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """dp 2 x pp 2, 4 micro batches, optimizer sharding, recompute: both stages; the folder with report and programs."""
    output = tmp_path_factory.mktemp("pipeline")
    result = run_dryrun(output, "--keep_programs", parallel_config__pipeline_stage=2, parallel_config__micro_batch_num=4,
                        parallel__parallel_optimizer_config="{parallel_optimizer_threshold: 1}")  # KB
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def report(pipeline):
    """The report of `pipeline`."""
    return json.loads((pipeline / "report.json").read_text())

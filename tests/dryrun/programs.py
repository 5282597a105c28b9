"""Fixtures: tiny programs, compiled once per session for all tests of the dry run."""

import json

import pytest

from dryrun.tiny import PIPELINE, run_dryrun


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """dp 2 x pp 2, 4 micro batches, optimizer sharding, recompute: both stages; the folder with report and programs."""
    output = tmp_path_factory.mktemp("pipeline")
    result = run_dryrun(output, "--keep_programs", **PIPELINE)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def report(pipeline):
    """The report of `pipeline`."""
    return json.loads((pipeline / "report.json").read_text())

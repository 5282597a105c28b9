"""Fixtures shared by all tests: a temporary working directory and the reference data."""
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """MindFormers writes output/, rank_0/ and the like into the current folder: every test gets its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def reference():
    """The folder of golden data made by the published model, tokenizer and LongBench code."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference data (../shared/reference, seen from the project's root) is not on this machine")
    return REFERENCE

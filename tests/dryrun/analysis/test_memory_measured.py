"""The liveness peak against what graphs that are compiled for the CPU need when they run there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dryrun.tiny import ROOT

# rows against widths: weights are small beside activations, for oneDNN keeps a packed copy of them that is no tensor
SIZES = [
    ("mlp", 16384, 1024),
    ("mlp", 8192, 1024),
    ("gated", 16384, 512),
    ("norms", 8192, 2048),
    ("norms", 16384, 1024),
    ("activations", 8192, 2048),
]


@pytest.mark.parametrize("net, rows, width", SIZES)
def test_the_peak_is_within_15_percent_of_the_measured_one(tmp_path, net, rows, width):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is measured through /proc/self/clear_refs, which this system does not have")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measured.py")), net, str(rows), str(width)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["constants"] == 0
    assert found["read"] > 4 * rows * width * 4  # several tensors alive
    assert abs(found["read"] - found["measured"]) <= 0.15 * found["measured"], found

"""Hostile files through the scripts: tests/soak_hostile.py says what is tried."""

import os
import subprocess
import sys

import pytest
from conftest import REPO

TRIALS = 168  # of each group of kinds: 504 in all


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.parametrize("kinds", ["weights recipe", "video name", "run cache image"])
def test_hostile_files_are_used_or_refused_and_nothing_is_lost(kinds):
    script = str(REPO / "tests" / "soak_hostile.py")
    command = [sys.executable, script, "--count", str(TRIALS), "--kinds", *kinds.split()]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    assert f"done: {TRIALS} trials, 0 wrong" in ended.stdout

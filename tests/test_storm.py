"""A round of the storm, whose command (tests/storm.py) has as many as one wants."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parent / "storm.py"


def test_runs_that_meet_faults_end_in_the_same_bits():
    if not shutil.which("unshare") or subprocess.run(["unshare", "--map-root-user", "--mount", "true"]).returncode:
        pytest.skip("no disks may be mounted here, not even by oneself (unshare --map-root-user --mount)")
    done = subprocess.run([sys.executable, STORM, "--rounds", "1", "--faults", "4"], capture_output=True, text=True)
    assert done.returncode == 0 and "1 rounds, 0 wrong" in done.stdout, done.stdout + done.stderr

"""Commands killed at random places: continued, they equal those never killed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_few_kills_cost_nothing():
    command = [sys.executable, "benchmarks/kills.py", "--kills=4", "--seed=1", "DM", "evaluate", "convert"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("'equal': 4") == 3

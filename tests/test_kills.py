"""Commands killed at random places: continued, they equal those never killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_no_recorded_kill_has_cost_anything():
    rows = json.loads((ROOT / "benchmarks" / "results" / "kills.json").read_text())["kills"]
    assert {"FRePo", "DM", "DC", "DSA", "MTT", "SRe2L", "GLaD", "evaluate", "continual", "membership"} <= {
        row["command"] for row in rows
    }
    assert [row for row in rows if (row["equal"], row["different"], row["half-written"]) != (20, 0, 0)] == []


@pytest.mark.slow
def test_a_few_kills_cost_nothing():
    command = [sys.executable, "benchmarks/kills.py", "--kills=4", "--seed=1", "DM", "evaluate", "convert"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("'equal': 4") == 3

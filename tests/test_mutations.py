"""Changed formulas: every listed change can be made, and a test has noticed each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import mutations  # noqa: E402


def test_every_change_can_be_made_and_was_noticed_when_last_tried():
    listed = list(mutations.mutations())
    for mutation in listed:
        assert compile(mutation.source(), mutation.module, "exec")
        assert all((ROOT / "tests" / name).is_file() for name in mutation.tests)
    rows = json.loads((ROOT / "benchmarks" / "results" / "mutations.json").read_text())["mutations"]
    assert [(row["formula"], row["change"]) for row in rows] == [(one.formula, one.what) for one in listed]
    assert all(row["caught by"] for row in rows)


@pytest.mark.slow
def test_a_change_that_a_test_notices_is_told_from_one_that_none_does():
    script = (
        "import mutations, pytest, torch\n"
        "one = next(one for one in mutations.mutations() if one.formula.startswith('scores'))\n"
        "print(mutations.outcome(one.tests, one), mutations.outcome(one.tests, one._replace(becomes=one.text + ' ')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=300, check=True
    )
    assert "failed='test_" in done.stdout
    assert "failed=None" in done.stdout

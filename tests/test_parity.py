"""The comparison with the official code: what needs no checkout is run, and what was recorded has no open line."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from parity import data, networks, official  # noqa: E402


def test_the_comparisons_with_torchvision_hold():
    lines = [*networks.torchvision_resnet18(Path()), *data.random_resized_crop(Path())]
    assert [line.what for line in lines if line.verdict != "equal"] == []


def test_a_line_says_whether_it_was_run():
    verdicts = [official.Line("part", "what", "file", difference).verdict for difference in (0.0, 1.0, None)]
    assert verdicts == ["equal", "differs", "not run"]


def test_every_recorded_line_is_equal_or_says_why_not():
    lines = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())["parity"]
    assert {line["part"] for line in lines} == {"methods", "networks", "augmentations", "preprocessing", "recipes"}
    assert [line["what"] for line in lines if line["verdict"] != "equal" and not line["note"]] == []


def test_a_checkouts_modules_are_gone_after_it(tmp_path):
    (tmp_path / "networks.py").write_text("MARK = 1")
    with official.checkout(tmp_path, "kornia"):
        import kornia
        import networks as theirs

        assert theirs.MARK == 1
        assert kornia.anything is not None
    assert "networks" not in sys.modules
    assert "kornia" not in sys.modules

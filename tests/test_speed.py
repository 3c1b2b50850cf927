"""What benchmarks/speed.py measures can be measured, and its rows make a table."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import scale
import speed
import tables


def test_a_step_is_timed_and_counted_and_its_time_beside_others_is_a_ratio(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "settle", lambda: None)
    rows = [{"work": name, "busy": 0} | speed.measure(name, 0.0, 4) for name in ("limit", "student", "dm")]
    assert all(row["steps"] >= 5 and row["median_s"] > 0 for row in rows)
    assert rows[0]["flops"] == 2 * 64 * 128 * 128 * 9 * 32 * 32
    assert rows[1]["flops"] > 2 * 10 * 19_505_152  # more than two forward passes of ten digits
    rows.append(rows[1] | {"busy": 1, "median_s": 2 * rows[1]["median_s"]})
    table = tables.speed(rows)
    assert "| work | step [ms] | beside 1 | of the limit |" in table
    assert "| 2.0x |" in table
    assert "| limit |" not in table


def test_the_official_code_is_run_on_the_same_data_and_timed_between_its_networks(monkeypatch, tmp_path):
    folder = tmp_path / "DatasetCondensation"
    folder.mkdir()
    (folder / "utils.py").write_text(
        "def get_network(images): return images\ndef get_dataset(): raise AssertionError\n"
    )
    (folder / "main_DM.py").write_text(
        "import sys, torch\nfrom utils import *\n"
        "train = get_dataset()[6]\n"
        "assert train[0][0].shape == (3, 32, 32) and '--ipc=1' in sys.argv\n"
        "drawn = torch.rand(3)\n"
        "drawn[:] = drawn[0]\n"
        "while True: get_network(train.tensors[0][:8].flatten(1)) @ torch.ones(3072, 2)\n"
    )
    monkeypatch.setattr(speed, "settle", lambda: None)
    row = speed.measure("dm, official", 0.0, 4, str(tmp_path))
    assert row["steps"] >= 5
    assert row["flops"] == 2 * 8 * 3072 * 2


def test_a_step_is_measured_by_size_and_its_powers_are_fitted():
    small = {**scale.BASE, "images per class": 1, "classes": 3, "side": 8, "real images": 30}
    assert all(scale.measure(scale.method_steps, name, small)["cpu_s"] > 0 for name in scale.METHODS)
    assert scale.measure(scale.regression_steps, 20)["cpu_s"] > 0
    rows = [
        {"work": "DM", "by": by, "size": n, "cpu_s": n**3 / 1e9, "mb": n**2 / 1e4}
        for by in ("side", "rows")
        for n in (100, 200, 500)
    ]
    table = tables.scale(rows)
    assert "| DM | side | 100, 200, 500 | 1, 8, 125 | 1, 4, 25 | n^3.00 | n^2.00 |" in table

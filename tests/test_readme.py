"""The README tells the truth: its example runs, its table is the recorded one, its files exist."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

from lightning_dd.distilled.set import DistilledSet

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_distiller_runs_as_printed(tmp_path, monkeypatch):
    code = re.search(r"<!-- example: [^>]*-->\n```python\n(.*?)```", TEXT, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    script = tmp_path / "example.py"
    script.write_text(code.replace("max_steps=200", "max_steps=3"))
    runpy.run_path(str(script))
    distilled = DistilledSet.load(tmp_path / "means.safetensors")
    assert distilled.method == "MeanFeatures"
    assert len(distilled) == 10


def test_the_tables_are_the_recorded_results():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], timeout=120)
    assert done.returncode == 0, "run: python benchmarks/tables.py"


def test_every_file_it_names_exists():
    names = set(re.findall(r"\b(?:configs|docs|benchmarks|tests|notebooks)/[\w./-]+\w", TEXT))
    assert len(names) > 5
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_its_length_is_kept():
    assert 120 <= TEXT.count("\n") <= 180

"""The README tells the truth: its example runs, its table is the recorded one, its files exist."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dd import DistilledSet
from lightning_dd.cli import main
from lightning_dd.data import MNIST5k
from lightning_dd.models import build_network
from lightning_dd.parsing import find_configuration
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"<!-- example: run [^>]*-->\n```python\n(.*?)```", TEXT, re.DOTALL)
PLAIN = re.search(r"<!-- example: plain [^>]*-->\n```python\n(.*?)```", TEXT, re.DOTALL)[1]


@pytest.mark.parametrize(("code", "method"), list(zip(EXAMPLES, ["FRePo"], strict=True)))
def test_the_examples_run_as_printed(code, method, tmp_path):
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    script = tmp_path / "example.py"
    script.write_text(re.sub(r"steps=\d+", "steps=3", code))
    runpy.run_path(str(script))
    distilled = DistilledSet.load(next(tmp_path.rglob("last.safetensors")))
    assert (distilled.method, len(distilled)) == (method, 10)


def test_plain_pytorch_reaches_what_a_student_reaches(tmp_path, capsys):
    distilled = DistilledSet.load("builtin:mnist5k_frepo_ipc1")
    exec(compile(PLAIN.replace("range(500)", "range(60)"), "README", "exec"), {})
    own = float(capsys.readouterr().out.removeprefix("accuracy"))
    student = build_network("conv:width=32,norm=none", 10, distilled.image_shape, seed=0)
    train_student(student, distilled, Recipe(steps=60, lr=1e-3, warmup=0, augment="none"), seed=0)
    test = MNIST5k()
    test.setup("test")
    with torch.no_grad():
        outputs = student(distilled.test_transform(test.test.pixels(slice(None))))
    expected = (outputs.argmax(1) == test.test.labels).float().mean().item()
    assert expected > 0.4  # ten times chance would be 1
    assert own == pytest.approx(expected, abs=0.05)


def test_what_a_contributor_copies_runs_from_a_package_of_their_own(tmp_path, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "my_package.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    words = shlex.split(re.search(r"PYTHONPATH=\. lightning-dd (.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", lambda *args: 1.0)  # said to be good
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 1.0)
    quick = ["--trainer.max_steps=2", "--model.probe.steps=1", "--trainer.accelerator=cpu"]
    assert main([word for word in words if word.strip()] + quick) == 0
    assert DistilledSet.load(next(tmp_path.rglob("last.safetensors"))).method == "MeanFeatures"


def test_every_configuration_it_names_exists():
    assert len([find_configuration(name) for name in re.findall(r"--config ([\w/]+)", TEXT)]) > 10


def test_the_tables_are_the_recorded_results():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], timeout=120)
    assert done.returncode == 0, "run: python benchmarks/tables.py"


def test_every_file_it_names_exists():
    names = set(re.findall(r"\b(?:configs|docs|benchmarks|tests|notebooks)/[\w./-]+\w", TEXT))
    assert len(names) > 4
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_every_module_that_contributors_are_sent_to_exists():
    names = re.findall(r"`([\w/]+\.py)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(names) > 15
    there = {path.name for folder in ("lightning_dd", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert not {Path(name).name for name in names} - there - {"my_package.py"}


def test_its_length_is_kept():
    assert 120 <= TEXT.count("\n") < 160

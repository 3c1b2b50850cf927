"""The wheel alone is enough: built, installed in an environment of its own, and used outside the checkout."""

import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("lightning_dd", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


def run(*command, folder, **more):
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=280, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_runs_from_an_installed_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, elsewhere, home = tmp_path / "source", tmp_path / "elsewhere", tmp_path / "environment"
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    elsewhere.mkdir()
    pip = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", elsewhere, source]
    run(sys.executable, "-m", *pip, folder=tmp_path)
    run(sys.executable, "-m", "venv", home, folder=tmp_path)
    wheel = next(elsewhere.glob("*.whl"))
    run(home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, folder=tmp_path)
    installed = next((home / "lib").glob("python*")) / "site-packages"
    (installed / "dependencies.pth").write_text("\n".join(site.getsitepackages()))  # downloaded once is enough

    def dd(*words):
        return run(home / "bin" / "lightning-dd", *words, folder=elsewhere, env={"PATH": "", "HOME": str(tmp_path)})

    assert "mnist5k/frepo " in dd("list", "configs")
    assert "builtin:mnist5k_dm_ipc10 " in dd("list", "sets")
    assert "cifar10/frepo ipc 10 " in dd("list", "cells", "frepo")
    quick = ["--trainer.max_steps=2", "--model.probe.steps=1", "--model.real_batch_size=8"]
    said = dd("fit", "--config", "mnist5k/frepo", "--config", "demo", "--model.architecture=conv:width=4", *quick)
    assert "next: lightning-dd evaluate runs/demo/distil " in said
    report = ["--output=report", "--steps=1", "--seeds=1", "--accelerator=cpu"]
    assert "| `conv:width=4`" in dd("evaluate", "runs/demo/distil", "--architectures", "conv:width=4", *report)

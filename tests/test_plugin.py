"""A package of somebody else, installed: all that can be added is used together, and nothing here knows of it."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dd import DistilledSet, distil, evaluate
from lightning_dd.cli import main
from lightning_dd.distillers import Probe

PLUGIN = Path(__file__).parent / "plugin"
FIT = ["fit", f"--config={PLUGIN / 'everything.yaml'}", "--trainer.accelerator=cpu"]
STUDENTS = [
    "--architectures",
    "dd_plugin.TinyNet",
    "convnet:width=4,depth=2",
    "--augment=dd_plugin.darken",
    "--steps=2",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip has installed the package to."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=120)
    return target


def test_all_six_work_together_from_a_file_in_a_fresh_process(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}

    def run(*arguments):
        command = [sys.executable, "-m", "lightning_dd", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run(*FIT)
    file = tmp_path / "runs" / "everything" / "version_0" / "last.safetensors"
    made = DistilledSet.load(file)
    assert (made.method, made.architecture, made.image_shape) == (
        "MeanFeatures",
        "dd_plugin.TinyNet:width=6",
        (1, 8, 8),
    )
    assert made.pixels()[0, 0, 0].unique_consecutive().numel() <= 2  # two coarse pixels a row
    own = ["--data=dd_plugin.Stripes", '--data_args={"contrast": 120, "val_fraction": 0.25}']
    table = run("evaluate", str(file), *STUDENTS, *own, "--seeds=1", "--accelerator=cpu", "--output=report")
    assert "| `dd_plugin.TinyNet` | yes |" in table


def test_all_six_work_together_from_options_and_from_python(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(installed)
    plugin = importlib.import_module("dd_plugin")
    options = [
        *("--model=dd_plugin.MeanFeatures", "--model.ipc=2", "--model.architecture=dd_plugin.TinyNet:width=6"),
        *("--model.parameterisation=dd_plugin.Coarse", "--model.parameterisation.factor=4", "--model.lifetime=0"),
        *("--model.augment=dd_plugin.darken", "--model.labels=hard", "--model.real_batch_size=8"),
        *("--data=dd_plugin.Stripes", "--data.contrast=120", "--data.val_fraction=0.25", "--model.probe.steps=1"),
        *("--trainer.callbacks+=dd_plugin.Calm", "--trainer.callbacks.weight=0.5", "--trainer.max_steps=4"),
    ]
    assert main(["fit", *options, "--trainer.accelerator=cpu"]) == 0
    by_options = DistilledSet.load(tmp_path / "runs" / "distil" / "version_0" / "last.safetensors")
    assert main(FIT) == 0
    by_file = DistilledSet.load(tmp_path / "runs" / "everything" / "version_0" / "last.safetensors")

    def distilled(*callbacks):
        model = plugin.MeanFeatures(
            ipc=2,
            architecture="dd_plugin.TinyNet:width=6",
            parameterisation=plugin.Coarse(factor=4),
            augment="dd_plugin.darken",
            labels="hard",
            lifetime=0,
            real_batch_size=8,
            probe=Probe(steps=1),
        )
        data = plugin.Stripes(contrast=120, val_fraction=0.25)
        return distil(model, data, 4, "python", callbacks=callbacks, accelerator="cpu")

    assert not torch.equal(distilled().images, by_options.images)  # without the outer term
    made = distilled(plugin.Calm(0.5))
    assert torch.equal(made.images, by_options.images)
    assert torch.equal(made.images, by_file.images)
    rows = evaluate(made, ["dd_plugin.TinyNet"], seeds=1, steps=1, augment="dd_plugin.darken", accelerator="cpu")
    assert [row.architecture for row in rows] == ["dd_plugin.TinyNet"] * 2


def test_a_term_of_metadd_is_a_class_too(installed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", lambda *args: 1.0)  # said to be good
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 1.0)
    metadd = [
        "--trainer.callbacks+=MetaDD",
        '--trainer.callbacks.architectures=["dd_plugin.TinyNet", "conv:width=4,depth=2"]',
    ]
    metadd += ["--trainer.callbacks.scale=absolute", "--trainer.callbacks.every=1"]

    def images(version, *options):
        assert main([*FIT, *metadd, *options, f"--trainer.logger.version={version}"]) == 0
        return DistilledSet.load(tmp_path / "runs" / "everything" / version / "last.safetensors").images

    own = ["--trainer.callbacks.loss=dd_plugin.Sharp", "--trainer.callbacks.loss.sharp=5"]
    assert not torch.equal(images("published"), images("own", *own))

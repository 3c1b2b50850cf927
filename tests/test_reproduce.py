"""A distilled set says its whole run, and the run can be made again from the file alone."""

import json

import pytest
import yaml
from helpers import make_distilled, tiny_settings
from test_cli import QUICK, only_line, status

from lightning_dd import DistilledSet, distil
from lightning_dd.cli import main
from lightning_dd.data import MNIST5k
from lightning_dd.distillers import DM
from lightning_dd.utils.commit import source_commit

METADD = [
    "--trainer.callbacks+=MetaDD",
    "--trainer.callbacks.architectures=[convnet:width=4, alexnet:width=4]",
    "--trainer.callbacks.training.steps=60",
    "--trainer.callbacks.every=1",
]


def test_the_file_alone_makes_the_run_again_with_metadd(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 1.0)  # said to be good
    assert main(["fit", *QUICK, *METADD, "--seed_everything=5"]) == 0
    file = tmp_path / "runs" / "mnist5k-frepo" / "version_0" / "last.safetensors"
    run = DistilledSet.load(file).run
    assert run["seed_everything"] == 5
    assert run["trainer"]["max_steps"] == 2
    assert run["trainer"]["callbacks+"][0]["class_path"].endswith(".MetaDD")
    assert str(tmp_path) not in json.dumps(run)
    capsys.readouterr()
    assert main(["info", str(file)]) == 0
    said = capsys.readouterr().out
    for part in ("FRePo: 10 classes x 1 images of 1x28x28", "MetaDD(", "max_steps 2", "seed 5", "half squared error"):
        assert part in said
    assert f"{file.stat().st_size:,}" in said
    assert main(["info", str(file), "--config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == run
    (tmp_path / "runs" / "reproduced" / "version_0").mkdir(parents=True)  # of an earlier one
    assert main(["reproduce", str(file), "--accelerator=cpu"]) == 0
    said = capsys.readouterr().out
    assert "images: equal, bit for bit" in said
    assert "labels: equal, bit for bit" in said
    assert main(["reproduce", str(file), "--output=runs/reproduced/version_1"]) == 2
    assert "holds a run already" in only_line(capsys)


def test_a_set_made_in_python_says_its_run_too(tmp_path):
    quick = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    settings = tiny_settings(DM)
    plain = distil(DM(architecture="convnet:width=4", **settings), MNIST5k(), 2, tmp_path / "plain", **quick)
    assert "callbacks+" not in plain.run["trainer"]  # what every run has is not said
    assert plain.training["commit"] == source_commit()
    assert plain.run["model"]["class_path"] == "lightning_dd.distillers.dm.DM"


def test_a_file_that_names_foreign_classes_is_not_run(capsys, tmp_path):
    run = {
        "seed_everything": 0,
        "trainer": {},
        "model": {"class_path": "antigravity.Boom"},
        "data": {"class_path": "x.Y"},
    }
    file = make_distilled(run=run).save(tmp_path / "set.safetensors")
    assert status(["reproduce", str(file)]) == 2
    assert "names 'antigravity.Boom', which is none of this project's" in only_line(capsys)
    assert main(["info", str(file)]) == 0  # looking is safe


def test_a_set_without_a_run_says_so(capsys, tmp_path):
    file = make_distilled().save(tmp_path / "set.safetensors")
    for words in (["reproduce", str(file)], ["info", str(file), "--config"]):
        assert status(words) == 2
        assert "does not say how it was made" in only_line(capsys)


@pytest.mark.parametrize("packed", [False, True])
def test_the_commit_is_read_from_a_checkout(packed, tmp_path):
    from lightning_dd.utils import commit

    home = tmp_path / ".git"
    (home / "refs" / "heads").mkdir(parents=True)
    (home / "HEAD").write_text("ref: refs/heads/main\n")
    if packed:
        (home / "packed-refs").write_text("# pack-refs\nabc123 refs/heads/main\n")
    else:
        (home / "refs" / "heads" / "main").write_text("abc123\n")
    assert commit._of_checkout(tmp_path) == "abc123"
    assert commit._of_checkout(tmp_path / "nothing") is None

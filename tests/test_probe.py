"""Linear layers on frozen features of networks that others trained."""

import json

import pytest
import torch
from helpers import TinyData, make_distilled
from safetensors.torch import save_file

from lightning_dd.api import evaluate
from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS
from lightning_dd.evaluators.probe import linear_probe
from lightning_dd.models import build_network
from lightning_dd.pretrained import Teacher
from lightning_dd.pretrained.task import Task
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError

BODY = "convnet:width=8,depth=2,norm=batch"


@pytest.fixture(autouse=True)
def _register_tiny_data(monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)


@pytest.fixture
def real():
    data = TinyData()
    data.setup("test")
    return data


@pytest.fixture
def weights(tmp_path, real):
    """A file of a network trained on the real data; its last layer is of other classes."""
    trained = Teacher(BODY, steps=40, lr=0.02).committee(Task.of(real), BODY).main
    state = {name: value.contiguous() for name, value in trained.state_dict().items() if not name.startswith("head.")}
    save_file(state | {"head.weight": torch.zeros(7, 2), "head.bias": torch.zeros(7)}, tmp_path / "body.safetensors")
    return str(tmp_path / "body.safetensors")


def test_a_student_trains_the_last_layer_and_nothing_else(real, weights):
    probe = linear_probe(BODY, weights, real.facts, real.preprocessing, seed=0)
    body = {name: value.clone() for name, value in probe.body.state_dict().items()}
    before = probe.head.weight.detach().clone()
    distilled = make_distilled(ipc=2)
    untouched = probe.features(distilled.images)
    trained = train_student(probe, distilled, Recipe(steps=5, lr=0.1, optimizer="adamw", weight_decay=0.1), seed=0)
    assert all(torch.equal(value, body[name]) for name, value in trained.body.state_dict().items())
    torch.testing.assert_close(trained.features(distilled.images), untouched)  # nor do its batch statistics move
    assert not torch.equal(trained.head.weight, before)


def test_the_report_is_of_probes_and_says_so(tmp_path, weights):
    asked = {"seeds": 1, "steps": 30, "lr": 0.05, "workers": 1}
    distilled = make_distilled(ipc=2)
    probed = evaluate(distilled, [BODY], tmp_path / "report", probe=weights, **asked)
    assert {row.source for row in probed} == {"distilled", "random-real"}
    random = next(row for row in probed if row.source == "random-real")
    assert random.accuracy > 0.6  # two images a class are enough on features of all
    assert "--probe=" in json.loads((tmp_path / "report" / "provenance.json").read_text())["command"]
    evaluate(distilled, [BODY], tmp_path / "report", **asked)
    assert len(list((tmp_path / "report" / "cells").glob("*.json"))) == 4  # no student is taken for another


def test_mistakes_are_one_line(tmp_path, capsys, real, weights):
    with pytest.raises(UserError, match=r"probe 'nowhere.pt': no such file"):
        linear_probe(BODY, "nowhere.pt", real.facts, real.preprocessing, seed=0)
    with pytest.raises(UserError, match=r"probe '.*' of architecture 'convnet:width=4.*' do not fit images"):
        linear_probe("convnet:width=4,depth=2,norm=batch", weights, real.facts, real.preprocessing, seed=0)
    file = str(make_distilled().save(tmp_path / "own.safetensors"))
    words = ["evaluate", file, "--architectures", BODY, "--output", str(tmp_path / "out"), "--probe", "default"]
    assert main(words) == 2
    assert "probe are of architectures as published" in capsys.readouterr().err
    assert not (tmp_path / "out" / "cells").exists()


def test_the_body_is_the_one_of_the_file(real, weights):
    trained = Teacher(BODY, steps=40, lr=0.02).committee(Task.of(real), BODY).main
    probe = linear_probe(BODY, weights, real.facts, real.preprocessing, seed=0)
    images = torch.randn(4, *real.facts.image_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probe.features(images), trained.features(images))
    other = build_network(BODY, real.facts.num_classes, real.facts.image_shape, 0).eval()
    assert not torch.allclose(other.features(images), probe.features(images))

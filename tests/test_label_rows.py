"""Sets once more with other labels, and random real images with the same beside them."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import TinyData, make_distilled

from lightning_dd.api import evaluate
from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS
from lightning_dd.data.parts import DataChoice
from lightning_dd.distilled import DistilledSet
from lightning_dd.evaluators.label_rows import LabelRows
from lightning_dd.pretrained import Teacher
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError

SMALL = "conv:width=4,depth=2,norm=none"
TEACHER = Teacher("convnet:width=4,depth=2,norm=batch", steps=20, lr=0.02)


@pytest.fixture(autouse=True)
def _register_tiny_data(monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)


def test_images_stay_and_labels_are_the_classes_the_teachers_or_those_of_every_pass(tmp_path):
    file = str(make_distilled(ipc=2).save(tmp_path / "own.safetensors"))
    recipe = Recipe(steps=4, batch_size=4)  # one batch a pass, for a second one would not be full
    found = LabelRows(("hard", "static", "dynamic"), TEACHER).files(
        {"own": file}, [recipe, Recipe(steps=1)], DataChoice(), tmp_path / "labelled"
    )
    assert list(found) == ["own", "own-hard", "own-static", "random-static", "own-dynamic", "random-dynamic"]
    sets = {name: DistilledSet.load(path) for name, path in found.items()}
    assert all(torch.equal(sets["own"].images, sets[f"own-{kind}"].images) for kind in ("hard", "static", "dynamic"))
    assert torch.equal(sets["own-hard"].labels.argmax(1), sets["own"].classes)
    assert sets["own-static"].label_kind == "soft"
    assert sets["own-static"].views is None
    assert sets["own-dynamic"].views.epochs == sets["random-dynamic"].views.epochs == 4
    torch.testing.assert_close(sets["own-dynamic"].labels, sets["own-static"].labels)
    assert sets["random-static"].images.shape == sets["own"].images.shape
    assert not torch.equal(sets["random-static"].labels, sets["own-static"].labels)


def test_seen_labels_are_of_the_own_network_trained_on_the_set_and_on_random_images(tmp_path):
    distilled = make_distilled(ipc=2)
    distilled = replace(distilled, config={**distilled.config, "architecture": SMALL})
    named = {"own": str(distilled.save(tmp_path / "own.safetensors"))}
    recipe = Recipe(steps=60, lr=0.02, warmup=0, augment="none")
    found = LabelRows(("seen",)).files(named, [recipe], DataChoice(), tmp_path / "labelled")
    assert list(found) == ["own", "own-seen", "random-seen"]
    own, random = (DistilledSet.load(found[name]) for name in ("own-seen", "random-seen"))
    assert (own.label_kind, own.views.epochs) == (random.label_kind, random.views.epochs) == ("soft", 60)
    assert torch.equal(own.images, distilled.images)
    assert torch.equal(own.labels.argmax(1), distilled.classes)  # it has learned the set, and its answers say so
    assert not torch.equal(own.labels, random.labels)
    silent = {"own": str(replace(distilled, config={}).save(tmp_path / "silent.safetensors"))}
    with pytest.raises(UserError, match="'seen' are of the network a set was distilled with; 'own' does not say which"):
        LabelRows(("seen",)).files(silent, [recipe], DataChoice(), tmp_path / "labelled")


def test_the_report_has_a_row_for_each_and_says_what_labels_take(tmp_path):
    distilled = make_distilled(ipc=2)
    rows = evaluate(
        distilled, [SMALL], tmp_path / "report", seeds=1, steps=2, labels=["hard", "dynamic"], teacher=TEACHER
    )
    assert list(dict.fromkeys(row.set for row in rows)) == ["test-0", "test-0-hard", "test-0-dynamic", "random-dynamic"]
    sizes = {row.set: row.label_bytes for row in rows if row.source == "distilled"}
    assert sizes["test-0"] == sizes["test-0-hard"] == 4 * 6 * 3
    assert sizes["test-0-dynamic"] == sizes["random-dynamic"] > sizes["test-0"]
    made_with = json.loads((tmp_path / "report" / "provenance.json").read_text())
    assert made_with["command"].endswith(f"--labels hard dynamic --teacher {TEACHER.architecture}")
    assert f"test-0-dynamic {sizes['test-0-dynamic'] / 1000:.1f} kB" in (tmp_path / "report" / "results.md").read_text()


def test_the_control_is_drawn_once_for_sets_of_one_size(tmp_path):
    named = {name: str(make_distilled(ipc=1).save(tmp_path / f"{name}.safetensors")) for name in ("a", "b")}
    named["c"] = str(make_distilled(ipc=2).save(tmp_path / "c.safetensors"))
    found = LabelRows(("static",), TEACHER).files(named, [Recipe(steps=1)], DataChoice(), tmp_path / "labelled")
    assert list(found) == ["a", "a-static", "random-static", "b", "b-static", "c", "c-static", "c-random-static"]


def test_a_set_is_not_taken_for_another_one_with_other_labels(tmp_path):
    named = {name: str(make_distilled().save(tmp_path / f"{name}.safetensors")) for name in ("a", "a-hard")}
    with pytest.raises(UserError, match="'a-hard' is what a set with other labels is called here: say --names"):
        LabelRows(("hard",)).files(named, [Recipe(steps=1)], DataChoice(), tmp_path / "labelled")


def test_what_is_wrong_is_said_before_a_teacher_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(LabelRows, "files", lambda *args: pytest.fail("a teacher would be trained"))
    asked = {"seeds": 1, "steps": 1, "labels": ["static"], "teacher": TEACHER}
    with pytest.raises(UserError, match="unknown architecture 'conw'"):
        evaluate(make_distilled(), ["conw"], tmp_path / "report", **asked)
    with pytest.raises(UserError, match="unknown augmentation 'spin'"):
        evaluate(make_distilled(), [SMALL], tmp_path / "report", augment="spin", **asked)


def test_mistakes_are_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="unknown labels 'soft'; known: dynamic, hard, seen, static"):
        LabelRows(("soft",))
    with pytest.raises(UserError, match="'static' are a teacher's"):
        LabelRows(("static",))
    file = str(make_distilled().save(tmp_path / "own.safetensors"))
    words = ["evaluate", file, "--architectures", SMALL, "--output", str(tmp_path / "out"), "--labels", "static"]
    assert main(words) == 2
    assert "name its architecture" in capsys.readouterr().err

"""Label- and augmentation-robust scores: formula, what each student is trained on, and the verb."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import TinyData, committee_of, make_distilled

from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS
from lightning_dd.distilled.views import ViewStyle
from lightning_dd.evaluators.matrix import SOURCES, random_real
from lightning_dd.evaluators.robustness import Robustness, score_files
from lightning_dd.models import build_network
from lightning_dd.students.recipe import Recipe
from lightning_dd.synthetic.labels import labelled_views
from lightning_dd.utils.errors import UserError

SMALL = "conv:width=4,depth=2,norm=none"
SHORT = Recipe(steps=3, lr=1e-2, warmup=0)


@pytest.fixture(autouse=True)
def _register_tiny_data(monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)


def tiny_data():
    data = TinyData()
    data.setup("fit")
    return data


def with_views(seed):
    """A set of random images with a teacher's answers to them and to views of them."""
    plain = random_real(make_distilled(label_kind="hard"), tiny_data(), seed)
    teacher = build_network(SMALL, 3, (1, 8, 8), seed=0)
    views = labelled_views(
        committee_of(teacher), plain.images, 2, ViewStyle(0.5), False, torch.Generator().manual_seed(seed)
    )
    labels = teacher(plain.images).detach()
    return replace(plain, labels=labels, label_kind="soft", temperature=4.0, views=views)


def test_the_scores_are_the_published_formulas():
    record = Robustness("set", "conv", 0, own=0.5, hard=0.4, random=0.3, plain=0.45, random_plain=0.35, all_real=0.9)
    low = math.exp(-1)
    # alpha = (0.2 - 0.5) / 2 = -0.15, beta = (0.2 + 0.1) / 2 = 0.15
    assert record.label_robust() == pytest.approx((math.exp(-0.15) - low) / (math.e - low), abs=1e-12)
    assert record.augmentation_robust() == pytest.approx((math.exp(0.15) - low) / (math.e - low), abs=1e-12)
    assert record.label_robust(weight=1.0) == pytest.approx((math.exp(0.2) - low) / (math.e - low), abs=1e-12)


def test_random_images_take_the_labels_of_their_class():
    distilled, data = make_distilled(ipc=2), tiny_data()
    order = torch.randperm(len(distilled), generator=torch.Generator().manual_seed(3))
    labels = torch.randn(distilled.labels.shape, generator=torch.Generator().manual_seed(4))
    shuffled = make_distilled(ipc=2)
    shuffled.images, shuffled.labels, shuffled.classes = (
        distilled.images[order],
        labels[order],
        distilled.classes[order],
    )
    drawn = SOURCES["random-same-labels"](shuffled, data, 0)
    assert torch.equal(drawn.images, random_real(distilled, data, 0).images)
    for label, kind in zip(drawn.labels, drawn.classes, strict=True):
        assert any(torch.equal(label, other) for other in shuffled.labels[shuffled.classes == kind])
    assert len({tuple(label.tolist()) for label in drawn.labels}) == len(distilled)


def test_hard_labels_are_the_classes_and_all_real_is_everything():
    distilled, data = make_distilled(ipc=2), tiny_data()
    hard = SOURCES["hard-labels"](distilled, data, 0)
    assert hard.label_kind == "hard"
    assert torch.equal(hard.labels.argmax(1), distilled.classes)
    assert torch.equal(hard.images, distilled.images)
    everything = SOURCES["all-real"](distilled, data, 0)
    assert torch.equal(everything.images, data.train.everything().images)
    assert torch.equal(everything.labels.argmax(1), data.train.labels)


def test_a_report_is_written_and_finished_students_are_not_trained_again(tmp_path, monkeypatch):
    for kind in ("learned", "hard"):
        make_distilled(label_kind=kind).save(tmp_path / f"{kind}.safetensors")
    files = [str(tmp_path / f"{kind}.safetensors") for kind in ("learned", "hard")]
    asked = (files, [SMALL], str(tmp_path / "report"), 2, SHORT, SHORT)
    records = score_files(*asked)
    assert [(record.set, record.seed) for record in records] == [
        ("learned", 0),
        ("learned", 1),
        ("hard", 0),
        ("hard", 1),
    ]
    assert all(record.own == record.hard for record in records[2:])
    assert all(record.all_real == other.all_real for record, other in zip(records[:2], records[2:], strict=True))
    written = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [row["label_robust"] for row in written] == [record.label_robust() for record in records]
    for suffix in ("csv", "md", "png"):
        assert (tmp_path / "report" / f"results.{suffix}").stat().st_size > 0
    monkeypatch.setattr("lightning_dd.evaluators.evaluate.run_cell", lambda *a: pytest.fail("trained again"))
    assert score_files(*asked) == records


def test_soft_labels_ask_for_a_control(tmp_path):
    soft = with_views(0)
    soft.save(tmp_path / "soft.safetensors")
    asked = ([str(tmp_path / "soft.safetensors")], [SMALL], str(tmp_path / "report"), 1, SHORT, SHORT)
    with pytest.raises(UserError, match="give --control"):
        score_files(*asked)
    make_distilled(label_kind="hard").save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="hard labels"):
        score_files(*asked, control=str(tmp_path / "other.safetensors"))
    control = with_views(1)
    control.save(tmp_path / "random.safetensors")
    records = score_files(*asked, control=str(tmp_path / "random.safetensors"))
    assert len(records) == 1
    plain = SOURCES["without-views"](soft, tiny_data(), 0)
    assert plain.views is None
    assert torch.equal(plain.labels, soft.labels)


def test_the_verb_names_what_is_wrong(tmp_path, capsys):
    assert (
        main(["scores", str(tmp_path / "none.safetensors"), "--architectures", SMALL, "--output", str(tmp_path)]) == 2
    )
    assert "none.safetensors" in capsys.readouterr().err

"""Methods that select real images, and the teacher they share: choices against brute force, and the whole run."""

import itertools

import pytest
import torch
from helpers import TinyData, split_of, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dd.callbacks import MetaDD
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import RDED, Herding, KCenter, Random
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.checkpoint import distilled_from_checkpoint
from lightning_dd.losses.coresets import herding, k_center
from lightning_dd.pretrained import classifier
from lightning_dd.pretrained.classifier import Teacher
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic import TeacherLabels
from lightning_dd.utils.errors import UserError

QUICK = Teacher(steps=60, lr=0.02)
TINY = {"architecture": "convnet:width=4,depth=2", "ipc": 2, "probe": Probe(steps=1), "teacher": QUICK}
SOFT = {"labels": TeacherLabels(epochs=3, temperature=5.0)}
METHODS = [Random, Herding, KCenter, RDED]


def data(**kwargs):
    return TinyData(val_fraction=0.25, **kwargs)


def selected(cls, folder, steps=1, source=None, **changes):
    model = cls(**(TINY | {"labels": "hard"} | changes))
    tiny_trainer(folder, steps, callbacks=[]).fit(model, source or data())
    return model


def rows_of(images, train):
    """Index of each image in the training split."""
    return [int((train.everything().images == image).flatten(1).all(1).nonzero()[0]) for image in images]


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """Count the teachers that are really trained, in a cache of the test's own."""
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))
    counted, train = [], classifier._fit

    def counting(architecture, *args):
        counted.append(architecture)
        return train(architecture, *args)

    monkeypatch.setattr(classifier, "_fit", counting)
    return counted


# ---- choices -----------------------------------------------------------------------------------------------------


def test_herding_is_the_greedy_choice_over_all_means():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    chosen = []
    for _ in range(9):
        left = [row for row in range(9) if row not in chosen]
        distances = {row: float((features.mean(0) - features[[*chosen, row]].mean(0)).norm()) for row in left}
        chosen.append(min(distances, key=distances.get))
    for count in (1, 4, 9):
        assert herding(features, count).tolist() == chosen[:count]


def test_k_center_is_farthest_first_from_the_row_nearest_the_mean():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    chosen = [min(range(9), key=lambda row: float((features[row] - features.mean(0)).norm()))]
    while len(chosen) < 9:
        chosen.append(max(range(9), key=lambda row: min(float((features[row] - features[c]).norm()) for c in chosen)))
    for count in (1, 4, 9):
        assert k_center(features, count).tolist() == chosen[:count]
    # Its radius is at most twice the best possible (Gonzalez 1985).

    def radius(centres):
        return max(min(float((row - features[c]).norm()) for c in centres) for row in features)

    # (with any first centre)
    assert radius(chosen[:3]) <= 2 * min(radius(some) for some in itertools.combinations(range(9), 3)) + 1e-6


@pytest.mark.parametrize(("cls", "choose"), [(Herding, herding), (KCenter, k_center)])
def test_coresets_choose_by_the_teachers_unit_features_class_by_class(cls, choose, tmp_path):
    model = selected(
        cls, tmp_path, ipc=6, architecture="convnet:width=4,depth=2,norm=none", teacher=Teacher(steps=60, lr=0.01)
    )
    images, labels = model.trainer.datamodule.train.everything()
    scales = torch.linspace(0.2, 5, len(images)).view(-1, 1, 1, 1)  # so that features are long and short
    train = split_of(images * scales, labels)
    expected, raw = [], []
    for label in range(3):
        own = (train.labels == label).nonzero().flatten()
        features = model.network.features(train.take(own).images).flatten(1)
        expected += own[choose(features / features.norm(dim=1, keepdim=True), 6)].tolist()
        raw += own[choose(features, 6)].tolist()
    assert rows_of(model.select(train), train) == expected
    assert expected != raw


def test_random_is_uniform_per_class_without_replacement_and_follows_the_seed(tmp_path):
    counts = torch.zeros(27)
    drawn = []
    for seed in range(60):
        model = Random(**(TINY | {"ipc": 3, "seed": seed}))
        model.trainer = tiny_trainer(tmp_path, callbacks=[])
        model.trainer.datamodule = source = data()
        source.setup("fit")
        model.task = Task.of(source)
        rows = rows_of(model.select(source.train), source.train)
        assert len(set(rows)) == 9
        assert source.train.labels[rows].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        counts[rows] += 1
        drawn.append(rows)
    assert len(set(map(tuple, drawn))) == 60
    # 60 draws of 3 out of 9: 20 on average, variance 60 * 1/3 * 2/3; chi-squared with 24 degrees of freedom.
    assert float(((counts - 20).square() / (60 * 2 / 9)).sum()) < 52  # 99.9 %
    first, again = (selected(Random, tmp_path).synthetic.images for _ in range(2))
    assert torch.equal(first, again)


# ---- the run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("labels", ["hard", "centred", "soft"])
def test_every_selection_runs_with_every_label_and_moves_nothing(cls, labels, tmp_path):
    model = selected(cls, tmp_path, steps=2, **({"labels": labels} | (SOFT if labels == "soft" else {})))
    chosen = model.select(model.trainer.datamodule.train)
    assert torch.equal(model.synthetic.images.detach(), chosen)
    loaded = DistilledSet.load(model.distilled_set().save(tmp_path / "set.safetensors"))
    assert loaded.label_kind == labels
    assert (loaded.views is not None) == (labels == "soft")
    assert loaded.labels.argmax(1).tolist() == [0, 0, 1, 1, 2, 2] or labels == "soft"


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_streamed_images_are_selected_alike(cls, tmp_path):
    kept, streamed = (selected(cls, tmp_path, source=data(keep_on_device=keep)) for keep in (True, False))
    assert torch.equal(kept.synthetic.images, streamed.synthetic.images)


def test_soft_labels_are_the_teachers_logits_of_images_and_views(tmp_path):
    model = selected(Random, tmp_path, **SOFT)
    assert torch.equal(model.synthetic.labels, torch.eye(3).repeat_interleave(2, 0))  # MetaDD's terms see these
    assert model.label_kind == "hard"
    distilled = model.distilled_set(outer_step=1)
    assert (distilled.label_kind, distilled.temperature, distilled.views.epochs) == ("soft", 5.0, 3)
    assert distilled.training["outer_step"] == 1
    assert distilled.config["labels"] == SOFT["labels"].recipe()
    torch.testing.assert_close(distilled.labels, model.network(distilled.images))
    images, logits = distilled.views.replay(distilled.images, 2, torch.arange(6))
    torch.testing.assert_close(logits, model.network(images), rtol=2e-3, atol=2e-3)
    assert model.distilled_set(views=False).training == {
        k: v for k, v in distilled.training.items() if k != "outer_step"
    }
    plain = selected(Random, tmp_path, labels=TeacherLabels(epochs=0, temperature=5.0)).distilled_set()
    assert plain.views is None
    torch.testing.assert_close(plain.labels, distilled.labels)


def test_labels_are_made_once_and_anew_when_images_move(tmp_path):
    model = selected(Random, tmp_path, **SOFT)
    first = model.distilled_set()
    assert model.distilled_set().views is first.views
    model.synthetic.images.data += 0.5
    moved = model.distilled_set()
    assert not torch.equal(moved.labels, first.labels)
    torch.testing.assert_close(moved.labels, model.network(moved.images))
    assert torch.equal(moved.views.crops, first.views.crops)  # of the run's seed alone


@pytest.mark.parametrize("mirrors", [True, False])
def test_views_of_digits_are_never_mirrored(mirrors, tmp_path):
    model = Random(**(TINY | {"labels": TeacherLabels(epochs=20)}))
    tiny_trainer(tmp_path, 1, callbacks=[]).fit(model, TinyData(val_fraction=0.25, mirror=mirrors))
    assert bool(model.distilled_set().views.flips.any()) == mirrors


class KeepSet(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        pl_module.distilled_set().save(self.folder / f"rank{trainer.global_rank}.safetensors")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_two_processes_select_and_label_the_same(cls, tmp_path):
    model = cls(**(TINY | SOFT))
    trainer = tiny_trainer(tmp_path, 1, callbacks=[KeepSet(tmp_path)], devices=2, strategy="ddp_fork")
    trainer.fit(model, data())
    first, second = (DistilledSet.load(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.views.logits, second.views.logits)


def test_a_checkpoint_becomes_a_soft_set_with_the_cached_teacher(trainings, tmp_path, monkeypatch):
    model = Random(**(TINY | SOFT))
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    tiny_trainer(tmp_path, 1, callbacks=[keep], enable_checkpointing=True).fit(model, data())
    exported = distilled_from_checkpoint(tmp_path / "step=1.ckpt")
    assert torch.equal(exported.labels, model.distilled_set().labels)
    assert torch.equal(exported.views.logits, model.distilled_set().views.logits)
    assert trainings == [TINY["architecture"]]
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="is not trained on this data yet"):
        distilled_from_checkpoint(tmp_path / "step=1.ckpt")


# ---- the teacher -------------------------------------------------------------------------------------------------


def test_the_teacher_is_trained_once_cached_and_reused(trainings, tmp_path):
    selected(Random, tmp_path)
    assert trainings == []  # hard labels of random images need none
    first = selected(Herding, tmp_path)
    assert trainings == [TINY["architecture"]]
    second = selected(KCenter, tmp_path, seed=3, ipc=1)
    assert trainings == [TINY["architecture"]]
    for left, right in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(left, right)
        assert not left.requires_grad
    assert not first.network.training
    selected(KCenter, tmp_path, teacher=Teacher("conv:width=4,depth=2", steps=50, lr=0.02))
    selected(Random, tmp_path, **SOFT, teacher=Teacher("conv:width=4,depth=2", steps=50, lr=0.02))
    assert trainings == [TINY["architecture"], "conv:width=4,depth=2"]
    assert not [name for name in first.state_dict() if "teacher" in name or "network" in name]


def test_several_architectures_are_a_committee_of_teachers_unless_the_teacher_names_its_own(trainings, tmp_path):
    several = {TINY["architecture"]: 1, "conv:width=4,depth=2": 3}
    selected(Random, tmp_path, **SOFT, architecture=several, teacher=Teacher(TINY["architecture"], steps=60, lr=0.02))
    assert trainings == [TINY["architecture"]]
    model = selected(Random, tmp_path, **SOFT, architecture=several)
    assert trainings == list(several)
    assert model.committee().mixture.probabilities == (0.25, 0.75)
    assert model.student_architecture == "conv:width=4,depth=2"


def test_a_missing_teacher_is_refused_where_none_may_be_trained(trainings, tmp_path):
    for cls, changes in ((Herding, {}), (Random, SOFT)):
        with pytest.raises(UserError, match="is not trained on this data yet, and train_missing is false"):
            selected(cls, tmp_path, train_missing=False, **changes)
    assert trainings == []
    selected(Herding, tmp_path)
    selected(KCenter, tmp_path, train_missing=False)


def test_without_a_validation_split_a_teacher_is_judged_on_what_it_was_trained_on(tmp_path, monkeypatch):
    judged = []
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))  # no teacher of another test is found

    def train(architecture, network, task, *args):
        judged.append(task.validation is task.train)
        return 1.0

    monkeypatch.setattr(classifier, "_fit", train)
    for val_fraction in (0, 0.25):
        tiny_trainer(tmp_path, 1, callbacks=[]).fit(Herding(**TINY), TinyData(val_fraction=val_fraction))
    assert judged == [True, False]


def test_metadd_on_a_selection_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_fit", lambda *args: 1.0)
    metadd = MetaDD(["convnet:width=4,depth=2", "conv:width=4,depth=2"])
    with pytest.raises(UserError, match=r"^MetaDD has nothing to act on: Random selects real images and learns none$"):
        tiny_trainer(tmp_path, 1, callbacks=[metadd]).fit(Random(**TINY), data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "learned"}, "labels of Random must be one of hard, centred, soft, got 'learned'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        Random(**(TINY | settings))


@pytest.mark.parametrize("cls", [Random, Herding, KCenter])
def test_more_images_than_there_are_of_a_class_are_refused(cls, tmp_path):
    with pytest.raises(UserError, match="ipc=10 is more than there are: class 'class0' has 9 images"):
        selected(cls, tmp_path, ipc=10)

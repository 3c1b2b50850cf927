"""What has become of DM: its distances, its extractors, and calibration."""

import cmath
import math
import statistics

import pytest
import torch
from helpers import TinyData, tiny_trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lightning_dd.callbacks import MetaDD
from lightning_dd.data.images import Batch
from lightning_dd.distillers import DM
from lightning_dd.distillers.base import Probe
from lightning_dd.losses.matching import class_characteristic_distance, class_mmd
from lightning_dd.models.pool import rest
from lightning_dd.pretrained import ClassifierRecipe, classifier, trained_classifier
from lightning_dd.pretrained.classifier import initial_network
from lightning_dd.utils.errors import UserError

NETWORK = "convnet:width=4,depth=2"
TINY = {"architecture": NETWORK, "real_per_class": 6, "probe": Probe(steps=2), "training": ClassifierRecipe(steps=30)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fitted(tmp_path, steps=1, **settings):
    model = DM(**(TINY | settings))
    tiny_trainer(tmp_path, steps).fit(model, TinyData(val_fraction=0.25))
    return model


def features(classes=3, few=2, many=5, length=4):
    own = torch.randn(classes * few, length, generator=generator(0), dtype=torch.float64)
    return own, torch.randn(classes * many, length, generator=generator(1), dtype=torch.float64)


# ---- the distances -----------------------------------------------------------------------------------------------


def test_mmd_is_that_of_explicit_kernels_with_the_median_of_each_class():
    own, real = features()
    expected = 0.0
    for label in range(3):
        ours, theirs = own[2 * label : 2 * label + 2].tolist(), real[5 * label : 5 * label + 5].tolist()
        both = ours + theirs
        width = statistics.median_low(math.dist(a, b) ** 2 for place, a in enumerate(both) for b in both[place + 1 :])

        def mean(left, right, width=width):
            return statistics.fmean(math.exp(-(math.dist(a, b) ** 2) / width) for a in left for b in right)

        expected += mean(ours, ours) + mean(theirs, theirs) - 2 * mean(ours, theirs)
    assert float(class_mmd(own, real, 3)) == pytest.approx(expected, rel=1e-9)


def test_the_characteristic_distance_is_that_of_explicit_complex_means():
    own, real = features()
    frequencies = torch.randn(7, 4, generator=generator(2), dtype=torch.float64)

    def phi(rows, t):
        units = F.normalize(rows, dim=1).tolist()
        return sum(cmath.exp(1j * sum(x * y for x, y in zip(row, t, strict=True))) for row in units) / len(units)

    for share in (0.5, 0.2):
        expected = 0.0
        for label in range(3):
            for t in frequencies.tolist():
                s, x = phi(own[2 * label : 2 * label + 2], t), phi(real[5 * label : 5 * label + 5], t)
                phase = 2 * (abs(s) * abs(x) - (s * x.conjugate()).real)
                expected += math.sqrt(share * (abs(s) - abs(x)) ** 2 + (1 - share) * phase) / len(frequencies)
        found = class_characteristic_distance(own, real, 3, frequencies, share)
        assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["mmd", "characteristic"])
def test_equal_distributions_have_no_distance_spread_counts_and_gradients_stay_finite(name):
    def distance(own, real):
        if name == "mmd":
            return class_mmd(own, real, 3)
        return class_characteristic_distance(own, real, 3, torch.randn(64, 4, generator=generator(2)))

    own, real = (part.float() for part in features(few=4, many=4))
    assert float(distance(own, own)) == pytest.approx(0, abs=5e-3)
    middle = real.view(3, 4, 4).mean(1, keepdim=True).expand(3, 4, 4).flatten(0, 1)
    assert float(distance(middle, real)) > 0.1  # the means are equal
    for start in (own, real, torch.zeros_like(own)):
        leaf = start.clone().requires_grad_()
        distance(leaf, real).backward()
        assert torch.isfinite(leaf.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(distance(own, real)) == float(distance(own, real).float())
    assert float(distance(own.bfloat16(), real)) == pytest.approx(float(distance(own, real)), rel=0.05)


@pytest.mark.parametrize(
    ("distance", "term"), [("mean", "means"), ("mmd", "mmd"), ("characteristic", "characteristic")]
)
def test_every_distance_lowers_itself_on_networks_it_never_met(distance, term, tmp_path):
    def unseen_loss(model):
        images, labels = model.synthetic()
        real, losses = model.draw_real(), []
        for seed in range(4):
            network = model.build_network(1000 + seed)
            rest(network)
            losses.append(float(model.outer_loss(network, images.detach(), labels, real)[term]))
        return sum(losses) / len(losses)

    settings = {"distance": distance, "lr": 3.0, "init": "noise", "augment": "none", "frequencies": 64, "ipc": 2}
    start, end = (fitted(tmp_path, steps, **settings) for steps in (0, 40))
    assert unseen_loss(end) < 0.9 * unseen_loss(start)


def test_every_step_draws_frequencies_of_its_own_as_many_as_are_asked_for(tmp_path, monkeypatch):
    seen = []

    def spy(own, real, num_classes, frequencies):
        seen.append(frequencies)
        return class_characteristic_distance(own, real, num_classes, frequencies)

    monkeypatch.setattr("lightning_dd.distillers.dm.class_characteristic_distance", spy)
    fitted(tmp_path, 2, distance="characteristic", frequencies=9)
    assert [len(drawn) for drawn in seen] == [9, 9]
    assert not torch.equal(*seen)


# ---- the extractors ----------------------------------------------------------------------------------------------


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def ends(model, seed=0, name=NETWORK):
    """Weights that an expert began with, and those it has come to."""
    expert = trained_classifier(name, model.task, model.expert_recipe, seed)[0]
    return weights(initial_network(name, model.facts, seed)), weights(expert)


class Spy(DM):
    def outer_loss(self, network, images, labels, real):
        self.__dict__.setdefault("seen", []).append((self.pool.current.architecture, weights(network)))
        return super().outer_loss(network, images, labels, real)


def seen_by(tmp_path, steps, **settings):
    model = Spy(**(TINY | settings))
    tiny_trainer(tmp_path, steps).fit(model, TinyData(val_fraction=0.25))
    return model


def test_trained_extractors_are_the_trained_networks_in_turn(tmp_path):
    model = seen_by(tmp_path, 6, extractors="trained", experts=2)
    expected = [ends(model, seed)[1] for seed in range(2)]
    found = [[torch.equal(own, end) for end in expected] for _, own in model.seen]
    assert all(map(any, found))
    assert all(any(row[index] for row in found) for index in range(2))


def test_interpolated_extractors_lie_between_where_a_network_began_and_where_it_came_to(tmp_path):
    model = seen_by(tmp_path, 5, extractors="interpolated")
    start, end = ends(model)
    shares = []
    for _, own in model.seen:
        share = float((own - start) @ (end - start) / (end - start).square().sum())
        torch.testing.assert_close(own, torch.lerp(start, end, share), atol=1e-5, rtol=1e-4)
        shares.append(share)
    assert 0 <= min(shares) < max(shares) <= 1
    assert len(set(shares)) == 5


def test_several_families_are_drawn_each_with_its_own_trained_weights(tmp_path):
    names = [NETWORK, "conv:width=4,depth=2"]
    model = seen_by(tmp_path, 8, architecture=names, extractors="trained")
    assert {name for name, _ in model.seen} == set(names)
    assert all(torch.equal(own, ends(model, name=name)[1]) for name, own in model.seen)
    assert set(model.pool.state_dict()["sizes"]) == set(names)  # by which each one's loss is scaled


def test_trained_networks_are_cached_and_shared_with_metadd(tmp_path, monkeypatch):
    trained, fit = [], classifier._fit
    monkeypatch.setattr(classifier, "_fit", lambda name, *rest: (trained.append(name), fit(name, *rest))[1])
    settings = {"training": ClassifierRecipe(steps=31), "extractors": "trained"}
    first, again = (fitted(tmp_path, seed=seed, **settings) for seed in range(2))
    other = "convnet:width=4,depth=2,norm=none"
    term = MetaDD([NETWORK, other], training=first.expert_recipe, every=1)
    tiny_trainer(tmp_path, 1, callbacks=[term]).fit(DM(**TINY), TinyData(val_fraction=0.25))
    assert trained == [NETWORK, other]
    assert torch.equal(weights(term.architectures[0].network), ends(again)[1])


# ---- calibration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extractors", ["trained", "interpolated"])
@pytest.mark.parametrize("labels", ["hard", "centred"])
def test_calibration_is_the_weighted_cross_entropy_under_the_trained_network(extractors, labels, tmp_path):
    model = fitted(tmp_path, calibration=3.0, extractors=extractors, labels=labels, augment="none")
    expert = trained_classifier(NETWORK, model.task, model.expert_recipe, 0)[0]
    if extractors == "trained":
        model.pool.network.load_state_dict(expert.state_dict())
    images, targets = model.synthetic()
    terms = model.outer_loss(model.network, images, targets, model.draw_real())
    expected = 3 * F.cross_entropy(expert(images), model.synthetic.classes)
    assert float(terms["calibration"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(torch.autograd.grad(terms["calibration"], model.synthetic.parameterisation.images)[0].norm()) > 0


def test_calibrated_images_are_recognised(tmp_path):
    def recognised(weight):
        settings = {"extractors": "interpolated", "init": "noise", "lr": 30.0, "ipc": 2, "augment": "none"}
        model = fitted(tmp_path, 30, calibration=weight, **settings)
        expert = trained_classifier(NETWORK, model.task, model.expert_recipe, 0)[0]
        return float(F.cross_entropy(expert(model.synthetic.images), model.synthetic.classes))

    assert recognised(30.0) < 0.8 * recognised(0.0)


def test_settings_that_cannot_be_are_refused_at_once():
    for settings, message in [
        ({"calibration": 1.0}, "calibration needs trained networks: extractors must be trained or interpolated"),
        ({"calibration": -1.0, "extractors": "trained"}, "calibration must be at least 0"),
        ({"distance": "mmdd"}, "unknown distance 'mmdd'; did you mean 'mmd'"),
        ({"extractors": "expert"}, "unknown extractors 'expert'"),
        ({"experts": 0}, "experts must be at least 1"),
        ({"frequencies": 0}, "frequencies must be at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            DM(**(TINY | settings))


@pytest.mark.parametrize("distance", ["mmd", "characteristic"])
def test_a_resumed_run_equals_the_run_never_interrupted(distance, tmp_path):
    settings = TINY | {"extractors": "interpolated", "experts": 2, "calibration": 1.0, "frequencies": 8}
    settings |= {"distance": distance, "architecture": [NETWORK, "conv:width=4,depth=2"]}

    def run(folder, model, **kwargs):
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = tiny_trainer(folder, 7, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(model, TinyData(val_fraction=0.25), **kwargs)

    straight, resumed = DM(**settings), DM(**settings)
    run(tmp_path, straight)
    run(tmp_path / "b", resumed, ckpt_path=str(tmp_path / "step=3.ckpt"), weights_only=True)
    assert torch.equal(straight.synthetic.images, resumed.synthetic.images)
    loaded = DM.load_from_checkpoint(tmp_path / "step=3.ckpt", weights_only=True)
    assert (loaded.expert_recipe, loaded.distance) == (straight.expert_recipe, distance)


def test_a_run_of_the_defaults_is_what_it_was(tmp_path):
    model = fitted(tmp_path, augment="none")
    images, labels = model.synthetic()
    real = Batch(torch.randn(6, 1, 8, 8, generator=generator()), torch.arange(3).repeat_interleave(2))
    own, target = (
        model.network.features(part).view(3, -1, model.network.num_features) for part in (images, real.images)
    )
    terms = model.outer_loss(model.network, images, labels, real)
    assert list(terms) == ["means"]
    expected = (own.mean(1) - target.mean(1)).square().sum()
    torch.testing.assert_close(terms["means"], expected)

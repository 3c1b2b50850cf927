"""FRePo's options: each does what it says, and a run with it that was resumed equals one that never stopped."""

import math

import pytest
import torch
from helpers import LinearNetwork, TinyData, tiny_trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dd.data import Batch
from lightning_dd.distillers import FRePo
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.frepo import FIRST_SCALE
from lightning_dd.losses.krr import averaged_kernel, centred_one_hot, half_squared_error, krr_predict
from lightning_dd.models.pool import rest
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator, seeded

TINY = {
    "architecture": "conv:width=4,depth=2",
    "real_batch_size": 8,
    "pool_size": 3,
    "lifetime": 4,
    "probe": Probe(steps=1),
}
OPTIONS = [
    {"views": 2},
    {"outer": "cross_entropy"},
    {"kernels": 2},
    {"perturb": 0.1, "kernels": 2},
    {"slice": 2, "kernels": 2},
    {"mixing_start": 5, "architecture": {"conv:width=4,depth=2": 0.5, "conv:width=4,depth=1": 0.5}, "lifetime": 1},
]


def frepo(**changes):
    """A FRePo whose random numbers of a step need no Trainer."""
    model = FRePo(**(TINY | changes))
    model.step_generator = lambda *purpose, device="cpu": make_generator(0, *purpose, device=device)
    return model


def linear(seed=0, **sizes):
    with seeded(seed):
        network = LinearNetwork(**sizes)
    rest(network)
    return network


def problem():
    """Synthetic images and labels, and a real batch."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(3, 1, 8, 8, generator=generator), torch.randn(3, 3, generator=generator)
    return images, labels, Batch(torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % 3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_resumed_run_equals_the_run_never_interrupted(options, tmp_path):
    def fit(folder, steps, **kwargs):
        model = FRePo(**(TINY | options))
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = tiny_trainer(folder, steps, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(model, TinyData(val_fraction=0.25), **kwargs)
        return model.state_dict(), model.pool.state_dict()["members"]

    straight, members = fit(tmp_path / "a", 8)
    checkpoint = str(tmp_path / "a" / "step=3.ckpt")
    resumed, again = fit(tmp_path / "b", 8, ckpt_path=checkpoint, weights_only=True)
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    for left, right in zip(members, again, strict=True):
        assert (left["architecture"], left["age"]) == (right["architecture"], right["age"])
        assert all(torch.equal(left["network"][name], right["network"][name]) for name in left["network"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturb": -0.1}, "perturb must be at least 0, got -0.1"),
        ({"slice": 2, "perturb": 0.1}, "slice must be 0 with perturb, got 2"),
        ({"slice": -1}, "slice must be at least 0, got -1"),
        ({"views": -1}, "views must be at least 0, got -1"),
        ({"kernels": 0}, "kernels must be at least 1, got 0"),
        ({"kernels": 4}, "kernels must be from 1 to pool_size, 3, got 4"),
        ({"outer": "ce"}, "unknown outer loss 'ce'; known: cross_entropy, mse"),
        ({"augment": "flip_crops"}, "unknown augmentation 'crops'; did you mean 'crop'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        frepo(**settings)


@pytest.mark.parametrize(("labels", "terms"), [("learned", {"krr", "label"}), ("centred", {"krr"}), ("hard", {"krr"})])
def test_only_learned_labels_have_a_margin_to_keep(labels, terms):
    model = frepo(labels=labels)
    assert model.outer_loss(linear(), *problem()).keys() == terms


# ---- views -------------------------------------------------------------------------------------------------------


def test_views_are_further_rows_with_the_labels_of_their_images():
    images, labels, real = problem()
    model = frepo(flip=True, views=2, augment="rotate_crop")
    support, shown = model.draw_views(images, real.images)
    assert support.shape == (4 * 3, 1, 8, 8)
    assert torch.equal(support[:6], torch.cat([images, images.flip(-1)]))
    parts = [*support.split(3), shown[:3]]
    assert not any(torch.equal(left, right) for index, left in enumerate(parts) for right in parts[:index])
    loss = model.outer_loss(linear(), images, labels, real)["krr"]
    plain = frepo(flip=False).outer_loss(linear(), support, labels.repeat(4, 1), Batch(shown, real.labels))["krr"]
    assert torch.equal(loss, plain)


def test_siamese_views_change_synthetic_and_real_images_alike():
    images, *_ = problem()
    support, shown = frepo(flip=False, views=2, augment="siamese").draw_views(images, images.clone())
    assert torch.equal(support[3:6], shown)
    assert not torch.equal(support[3:6], images)
    own, shown = frepo(flip=False, views=1, augment="rotate").draw_views(images[:1].repeat(2, 1, 1, 1), images)
    assert not torch.equal(own[2], own[3])  # FRePo's family: every image its own numbers


def test_a_data_set_without_mirror_images_has_no_mirrored_views(tmp_path):
    model = FRePo(**(TINY | {"views": 1}))
    tiny_trainer(tmp_path, 1).fit(model, TinyData(mirror=False))
    assert "flip" not in model._augmentation.strategy


# ---- the outer loss ----------------------------------------------------------------------------------------------


def test_cross_entropy_of_scaled_predictions_and_the_gradient_of_the_scale():
    images, labels, real = problem()
    model = frepo(flip=False, outer="cross_entropy")
    network = linear()
    prediction = krr_predict(network.features(images), labels, network.features(real.images)).values.double()

    def by_hand(log_scale):
        return -(math.exp(log_scale) * prediction).log_softmax(1)[torch.arange(6), real.labels].mean().item()

    loss = model.outer_loss(network, images, labels, real)["krr"]
    at = math.log(FIRST_SCALE)
    assert loss.item() == pytest.approx(by_hand(at), rel=1e-5)
    loss.backward()
    numeric = (by_hand(at + 1e-4) - by_hand(at - 1e-4)) / 2e-4
    assert model.log_scale.grad.item() == pytest.approx(numeric, rel=1e-4)


def test_the_scale_learns_at_its_own_rate_without_trust_ratio_and_is_in_the_checkpoint(tmp_path):
    def scale_after_one_step(**changes):
        model = FRePo(**(TINY | {"outer": "cross_entropy"} | changes))
        tiny_trainer(tmp_path, 1).fit(model, TinyData())
        return model.state_dict()["log_scale"].item()

    start = math.log(FIRST_SCALE)
    assert abs(scale_after_one_step() - start) == pytest.approx(0.01, rel=1e-2)  # Adam's first step
    assert abs(scale_after_one_step(scale_lr=0.05, lr=0.1) - start) == pytest.approx(0.05, rel=1e-2)
    assert "log_scale" not in frepo().state_dict()


# ---- kernels of several networks ---------------------------------------------------------------------------------


class Others:
    """In place of a pool: what :meth:`ModelPool.others` would draw."""

    def __init__(self, *networks):
        self.networks = networks

    def others(self, count, generator):
        return list(self.networks[:count])


def test_the_kernels_of_several_networks_are_averaged_before_the_solve():
    images, labels, real = problem()
    model = frepo(flip=False, kernels=2, ridge=1e-3)
    alone = frepo(flip=False, ridge=1e-3).outer_loss(linear(), images, labels, real)["krr"]
    model.pool = Others(linear())
    torch.testing.assert_close(model.outer_loss(linear(), images, labels, real)["krr"], alone)
    model.pool = Others(linear(1, num_features=7))
    both = model.outer_loss(linear(), images, labels, real)["krr"]
    networks = [linear(), linear(1, num_features=7)]
    pairs = [(network.features(images), network.features(real.images)) for network in networks]
    support, query = averaged_kernel(pairs)
    values = krr_predict(support, labels, query, 1e-3).values
    torch.testing.assert_close(both, half_squared_error(values, centred_one_hot(real.labels, 3)))
    assert abs(both - alone) > 1e-3 * alone


def test_in_slices_a_network_looks_at_few_images_at_once_and_again_for_the_same_gradient():
    def gradient(rows):
        images, labels, real = problem()
        model, seen = frepo(slice=rows, ridge=1e-3), []
        model.features = lambda network, part: seen.append(len(part)) or network.features(part)
        loss = model.outer_loss(linear(), images.requires_grad_(), labels, real)["krr"]
        return torch.autograd.grad(loss, images)[0], seen

    (whole, once), (sliced, twice) = gradient(0), gradient(2)
    torch.testing.assert_close(sliced, whole)
    assert once == [6, 6]
    assert twice == [2, 2, 2, 6, 2, 2, 2]  # three images and their mirror images, the real batch, the images again


def test_the_pool_lends_other_networks_each_once_and_unlike_ones_fit_together(tmp_path):
    mixture = {"conv:width=4,depth=2": 0.5, "convnet:width=8,depth=1,activation=gelu": 0.5}
    model = FRePo(**(TINY | {"architecture": mixture, "kernels": 3, "labels": "centred"}))
    trainer = tiny_trainer(tmp_path, 5)
    trainer.fit(model, TinyData())
    assert torch.isfinite(model.synthetic.images).all()
    drawn = model.pool.others(2, torch.Generator().manual_seed(0))
    everyone = {id(member.network) for member in model.pool.members}
    assert {id(network) for network in [model.pool.network, *drawn]} == everyone

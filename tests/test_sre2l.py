"""SRe2L: batch statistics, recovery group by group, the clip to pixels, and bad settings."""

import math

import pytest
import torch
from helpers import TinyData, tiny_trainer
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_dd.augment.crops import resample
from lightning_dd.callbacks import MetaDD, PoolAlternation
from lightning_dd.distillers import SRe2L
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.sre2l import Voter, recovery_groups
from lightning_dd.losses.matching import StatisticsDistance, batch_norm_layers
from lightning_dd.models import build_network
from lightning_dd.models.factory import NetworkMixture
from lightning_dd.models.pool import rest
from lightning_dd.pretrained import ClassifierRecipe, Committee
from lightning_dd.pretrained.classifier import Teacher
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic import TeacherLabels
from lightning_dd.utils.errors import UserError

TEACHER = Teacher("convnet:width=4,depth=2,norm=batch", steps=60, lr=0.02)
TINY = {
    "architecture": "convnet:width=4,depth=2",
    "ipc": 2,
    "lr": 0.1,
    "jitter": (-1, 1),
    "min_scale": 0.5,
    "teacher": TEACHER,
    "labels": TeacherLabels(epochs=2),
    "probe": Probe(steps=2),
}


def data(**kwargs):
    return TinyData(**({"val_fraction": 0.25} | kwargs))


def run(folder, steps=3, source=None, trainer=None, **changes):
    model = SRe2L(**(TINY | changes))
    (trainer or tiny_trainer(folder, steps, callbacks=[])).fit(model, source or data())
    return model


# ---- the statistics ----------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Batch normalisation of maps, and of vectors."""

    def __init__(self):
        super().__init__()
        self.second = nn.BatchNorm1d(5)  # named before the first, which is called first
        self.linear = nn.Linear(3 * 16, 5)
        self.first = nn.BatchNorm2d(3)
        self.untracked = nn.BatchNorm1d(5, track_running_stats=False)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.first, self.second):
            layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator))

    def forward(self, images):
        return self.untracked(self.second(self.linear(self.first(images).flatten(1))))


def distance_by_hand(network, images, first_weight):
    total = torch.zeros(())
    inputs = {"first": images.transpose(0, 1).flatten(1)}
    inputs["second"] = network.linear(network.first(images).flatten(1)).T
    for name, weight in (("first", first_weight), ("second", 1.0)):
        layer, rows = getattr(network, name), inputs[name]
        mean = rows.mean(1)
        variance = ((rows - mean[:, None]) ** 2).mean(1)
        total = total + weight * (mean - layer.running_mean).square().sum().sqrt()
        total = total + weight * (variance - layer.running_var).square().sum().sqrt()
    return total


def measured(network, images, groups=1, first_weight=10.0):
    distance = StatisticsDistance(groups, first_weight)
    with distance.watch(network):
        network(images)
    return distance.total()


@pytest.mark.parametrize("rows", [1, 6])
def test_the_distance_is_the_explicit_one_and_the_first_layer_weighs_ten_times(rows):
    network = TwoLayers().eval()
    images = torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    if rows == 1:
        network.untracked.track_running_stats = True  # it could not normalise a single vector by itself
        network.untracked.running_mean, network.untracked.running_var = None, None
        network.untracked = nn.Identity()
    for weight in (10.0, 1.0):
        own, expected = measured(network, images, first_weight=weight), distance_by_hand(network, images, weight)
        torch.testing.assert_close(own, expected)
        gradients = [torch.autograd.grad(value, images)[0] for value in (own, expected)]
        torch.testing.assert_close(*gradients)


def test_groups_that_share_a_pass_have_statistics_of_their_own():
    network = TwoLayers().eval()
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = distance_by_hand(network, images[:3], 10.0) + distance_by_hand(network, images[3:], 10.0)
    torch.testing.assert_close(measured(network, images, groups=2), expected)
    assert abs(float(expected - measured(network, images))) > 1e-3


def test_watching_leaves_no_hook_and_layers_without_statistics_are_skipped():
    network = TwoLayers().eval()
    assert batch_norm_layers(network) == [network.second, network.first]
    with pytest.raises(RuntimeError, match="boom"), StatisticsDistance().watch(network):
        raise RuntimeError("boom")
    assert not any(module._forward_pre_hooks for module in network.modules())
    with pytest.raises(RuntimeError, match="no layer"):
        StatisticsDistance().total()


def test_real_images_are_nearer_to_the_statistics_than_noise(tmp_path):
    model = run(tmp_path, 0)
    train = model.trainer.datamodule.train
    noise = torch.randn(train.everything().images.shape, generator=torch.Generator().manual_seed(0))
    assert float(measured(model.network, train.everything().images)) < 0.3 * float(measured(model.network, noise))


# ---- recovery ----------------------------------------------------------------------------------------------------


def test_groups_hold_one_image_per_class_of_at_most_a_hundred_classes():
    (whole,) = recovery_groups(4, 3)
    assert whole.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    blocks = recovery_groups(5, 2, largest=2)
    assert [tuple(block.shape) for block in blocks] == [(2, 2), (2, 2), (2, 1)]
    assert sorted(torch.cat([block.flatten() for block in blocks]).tolist()) == list(range(10))
    assert blocks[1].tolist() == [[4, 6], [5, 7]]


@pytest.mark.parametrize(("classes", "rows"), [(100, 512), (100, 3), (2, 512)])
def test_recovering_groups_together_is_recovering_each_alone(classes, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dd.distillers.sre2l._CLASSES", classes)
    monkeypatch.setattr("lightning_dd.distillers.sre2l._ROWS", rows)
    monkeypatch.setattr(recovery_groups, "__defaults__", (classes,))
    model = run(tmp_path, 0, ipc=3, bn_weight=0.3)
    model.trainer.fit_loop.epoch_loop._batches_that_stepped = 0
    images = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    (term,) = model.outer_terms(images, model.synthetic.labels).values()
    (2 * term).backward()
    windows, network = model.draw_windows(), model.network
    groups = [rows for block in recovery_groups(3, 3, classes) for rows in block]
    total, expected = 0.0, torch.zeros_like(images)
    for index, group in enumerate(groups):
        alone = images.detach()[group].requires_grad_()
        crop, flip = windows.crops[index].expand(len(group), 4), windows.flips[index].expand(len(group))
        shown = resample(alone, crop, flip).roll(tuple(windows.shifts[index].tolist()), (2, 3))
        inputs = [shown := network.convs[0](shown)]
        shown = F.avg_pool2d(network.norms[0](shown).relu(), 2)
        inputs.append(network.convs[1](shown))
        logits = network.classify(F.avg_pool2d(network.norms[1](inputs[1]).relu(), 2).flatten(1))
        loss = F.cross_entropy(logits, group // 3)
        for layer, maps, weight in zip(network.norms, inputs, (10.0, 1.0), strict=True):
            variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
            loss = loss + 0.3 * weight * ((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())
        loss.backward()
        total += float(loss)
        expected[group] = alone.grad
    assert float(term) == pytest.approx(total, rel=1e-4)
    torch.testing.assert_close(images.grad, 2 * expected, rtol=1e-3, atol=1e-5)


COMMITTEE = Teacher(
    {"convnet:width=4,depth=2,norm=batch": 1, "conv:width=4,depth=2": 1, "resnet18:channels=[4,4,4,4]": 2},
    steps=40,
    lr=0.02,
)


def gradient_of(model, images):
    images = images.detach().clone().requires_grad_()
    return torch.autograd.grad(model.outer_terms(images, model.synthetic.labels)["recovery"], images)[0]


@pytest.mark.parametrize("logits_from", ["each", "primary"])
def test_voters_terms_are_added_by_their_votes(logits_from, tmp_path, monkeypatch):
    model = run(tmp_path, 0, teacher=COMMITTEE, voters=2, logits_from=logits_from)
    monkeypatch.setattr(model.trainer.fit_loop.epoch_loop, "_batches_that_stepped", 0)
    committee = model.committee()
    committee.accuracies = [0.5, 0.6, 0.55]
    voters = model.draw_voters()
    votes = [voter.statistics for voter in voters]
    if logits_from == "primary":
        assert voters[0].network is committee.main is committee.networks[2]
        assert [voter.fit for voter in voters] == [1, 0, 0]
        assert sorted(votes) == pytest.approx([0, 1 / (1 + math.e**2), 1 / (1 + math.e**-2)])  # 10 points over 5
    else:
        assert [voter.fit for voter in voters] == votes
        assert sum(votes) == pytest.approx(1)
        assert voters[0].network is not voters[1].network
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found, expected = gradient_of(model, images), torch.zeros_like(images)
    for voter in voters:
        for weights, share in (((1.0, 0.0), voter.fit), ((0.0, 1.0), voter.statistics)):
            monkeypatch.setattr(model, "draw_voters", [Voter(voter.network, *weights)].copy)
            expected += share * gradient_of(model, images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_voters_are_drawn_without_replacement_by_their_weights_and_vote_by_accuracy():
    networks = [build_network("convnet:width=1,depth=1", 3, (1, 8, 8), seed=seed) for seed in range(3)]
    committee = Committee(networks, NetworkMixture.parse({"a": 1, "b": 1, "c": 8}), [0.4, 0.5, 0.5])
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(200):
        (first, share), (second, other) = committee.voters(2, generator)
        assert first is not second
        assert (share < other) == (first is networks[0])
        assert (share == other) == (networks[0] not in (first, second))
        drawn.append(first)
    assert 0.7 < sum(network is networks[2] for network in drawn) / 200 < 0.9
    assert all(networks[2] is not network for network, _ in committee.voters(2, generator, main=False))


def test_a_committee_recovers_and_a_resumed_one_equals_it(tmp_path):
    def fit(folder, **kwargs):
        model = SRe2L(**(TINY | {"teacher": COMMITTEE, "voters": 2, "init": "patches"}))
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        tiny_trainer(folder, 4, callbacks=[keep], enable_checkpointing=True).fit(model, data(), **kwargs)
        return model.synthetic.images

    straight = fit(tmp_path / "a")
    assert torch.equal(straight, fit(tmp_path / "b", ckpt_path=str(tmp_path / "a" / "step=2.ckpt"), weights_only=True))
    assert not torch.equal(straight, run(tmp_path, 4, teacher=COMMITTEE, init="patches").synthetic.images)


POOLED = Teacher("resnet18:channels=[4,4,4,4]", steps=40, lr=0.02)
STAGES = {"teacher": POOLED, "init": "real", "stages": 3, "residual": 0.25, "coarse": 0.75}


class Sizes(Callback):
    """The sides of the images that the teacher is shown, step by step."""

    def on_train_start(self, trainer, pl_module):
        self.seen = []
        hook = lambda module, given: self.seen.append(tuple(given[0].shape[2:]))  # noqa: E731
        self.handle = pl_module.network.register_forward_pre_hook(hook)

    def on_train_end(self, *args):
        self.handle.remove()


def test_every_other_stage_before_the_last_is_coarse(tmp_path):
    watch = Sizes()
    run(tmp_path, trainer=tiny_trainer(tmp_path, 7, callbacks=[watch]), **STAGES)
    assert watch.seen[:7] == [(8, 8)] * 2 + [(6, 6)] * 2 + [(8, 8)] * 3


def test_a_stage_begins_with_a_share_of_the_images_of_the_start(tmp_path, monkeypatch):
    start = run(tmp_path, 0, **STAGES).synthetic.images.detach()
    model = run(tmp_path, 7, **STAGES)
    (optimizer,) = model.trainer.optimizers
    images = model.synthetic.images
    for step in range(7):
        monkeypatch.setattr(Trainer, "global_step", step)
        before = images.detach().clone()
        assert optimizer.state
        model.on_train_batch_start(0, 0)
        if step in (2, 4):
            torch.testing.assert_close(images.detach(), 0.25 * before + 0.75 * start)
            assert not optimizer.state  # Adam begins anew
            optimizer.state[images] = {"step": 1}
        else:
            assert torch.equal(images, before)


def test_a_run_in_stages_resumes_exactly(tmp_path):
    def fit(folder, **kwargs):
        model = SRe2L(**(TINY | STAGES))
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        tiny_trainer(folder, 6, callbacks=[keep], enable_checkpointing=True).fit(model, data(), **kwargs)
        return model.synthetic.images

    straight = fit(tmp_path / "a")
    for step in (2, 3):  # before a stage begins, and within it
        ckpt_path = str(tmp_path / "a" / f"step={step}.ckpt")
        assert torch.equal(straight, fit(tmp_path / f"b{step}", ckpt_path=ckpt_path, weights_only=True))
    assert not torch.equal(straight, run(tmp_path, 6, **(STAGES | {"residual": 1.0})).synthetic.images)


def test_coarse_stages_need_teachers_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", None)
    with pytest.raises(
        UserError, match=r"'convnet:width=4,depth=2,norm=batch' takes none but those of \[8, 8\] pixels"
    ):
        run(tmp_path, **(STAGES | {"teacher": TEACHER}))


def test_a_window_is_shared_by_its_group_and_drawn_anew_at_each_step(tmp_path):
    model = SRe2L(**(TINY | {"ipc": 200, "jitter": (-2, 2), "min_scale": 0.3}))
    tiny_trainer(tmp_path, 0, callbacks=[]).fit(SRe2L(**TINY), data())
    trainer = tiny_trainer(tmp_path, 1, callbacks=[])
    model.task, model._trainer = task(), trainer
    windows = model.draw_windows()
    assert windows.crops.shape == (200, 4)
    assert sorted(set(windows.shifts.flatten().tolist())) == [-2, -1, 0, 1, 2]
    assert 0.3 < float(windows.flips.float().mean()) < 0.7
    trainer.fit_loop.epoch_loop.batch_progress.total.ready += 1
    trainer.fit_loop.epoch_loop.batch_progress.current.ready += 1
    assert not torch.equal(windows.crops, model.draw_windows().crops)


def test_rolls_go_one_way_unless_told_otherwise_and_flips_can_be_left_out(tmp_path):
    """The paper's CIFAR code rolls by ``randint(0, limit)`` and mirrors nothing; its Tiny ImageNet code does both."""
    model = SRe2L(**(TINY | {"ipc": 200, "jitter": 2, "flip": False}))
    model.task, model._trainer = task(mirror=True), tiny_trainer(tmp_path, 1, callbacks=[])
    windows = model.draw_windows()
    assert sorted(set(windows.shifts.flatten().tolist())) == [0, 1, 2]
    assert not windows.flips.any()


def task(**kwargs):
    source = data(**kwargs)
    source.setup("fit")
    return Task.of(source)


def test_recovery_lowers_both_terms(tmp_path):
    source = data()
    start, end = run(tmp_path, 0, source), run(tmp_path, 60, bn_weight=0.1)
    labels = start.synthetic.labels
    terms = []
    for model in (start, end):
        model._trainer = end.trainer
        pixels = source.preprocessing.clipped(model.synthetic.images.detach())
        groups = torch.cat([rows for block in recovery_groups(3, 2) for rows in block])
        windows = end.draw_windows()._replace(crops=torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))
        terms.append([float(term) for term in end.recovery_loss(pixels[groups], labels[groups], windows, end.network)])
    (fit_before, distance_before), (fit_after, distance_after) = terms
    assert fit_after < 0.5 * fit_before
    assert distance_after < 0.8 * distance_before


# ---- the run -----------------------------------------------------------------------------------------------------


class AfterEachStep(Callback):
    def __init__(self):
        self.pixels = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        images = pl_module.synthetic.images.detach()
        self.pixels.append(pl_module.task.preprocessing.inverse(images))


@pytest.mark.parametrize("preprocessing", ["standardise", "zca"])
def test_images_are_clipped_to_pixels_after_every_step(preprocessing, tmp_path):
    watch = AfterEachStep()
    source = data(preprocessing=preprocessing)
    run(tmp_path, 3, source, tiny_trainer(tmp_path, 3, callbacks=[watch]), lr=1.0)
    assert len(watch.pixels) == 3
    for pixels in watch.pixels:
        assert -1e-4 <= float(pixels.min()) <= 1e-4  # the noise it starts from goes beyond either end
        assert 1 - 1e-3 <= float(pixels.max()) <= 1 + 1e-3
    inside = source.train.everything().images
    torch.testing.assert_close(source.preprocessing.clipped(inside), inside, rtol=1e-3, atol=1e-3)


def test_adam_has_the_papers_betas_and_ends_at_zero(tmp_path):
    model = run(tmp_path, 4)
    (optimizer,) = model.trainer.optimizers
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    scheduler = model.trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)
    assert scheduler.lr_lambdas[0](2) == pytest.approx(0.5)


def test_the_set_starts_from_noise_and_is_relabelled(tmp_path):
    start = run(tmp_path, 0)
    assert abs(float(start.synthetic.images.std()) - 1) < 0.1
    distilled = run(tmp_path, 3).distilled_set()
    assert (distilled.label_kind, distilled.temperature, distilled.views.epochs) == ("soft", 20.0, 2)
    assert run(tmp_path, 1, labels="hard").distilled_set().label_kind == "hard"


def test_a_resumed_recovery_equals_the_one_never_interrupted(tmp_path):
    def fit(folder, **kwargs):
        model = SRe2L(**TINY)
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = tiny_trainer(folder, 7, callbacks=[keep], enable_checkpointing=True, val_check_interval=2)
        trainer.fit(model, data(), **kwargs)
        return model

    straight = fit(tmp_path / "a")
    resumed = fit(tmp_path / "b", ckpt_path=str(tmp_path / "a" / "step=3.ckpt"), weights_only=True)
    assert torch.equal(straight.synthetic.images, resumed.synthetic.images)
    assert torch.equal(straight.distilled_set().views.logits, resumed.distilled_set().views.logits)


def test_metadd_joins_the_recovery_with_hard_labels(tmp_path):
    seen = []

    class Watched(MetaDD):
        def measure(self, images, labels, label_kind, *args):
            seen.append((label_kind, labels.clone()))
            return super().measure(images, labels, label_kind, *args)

    settings = {"every": 1, "training": ClassifierRecipe(steps=30), "weight": 1.0}
    metadd = Watched(["convnet:width=4,depth=2", "conv:width=4,depth=2"], **settings)
    trainer = tiny_trainer(tmp_path, 2, callbacks=[PoolAlternation(), metadd])
    with_term = run(tmp_path, trainer=trainer)
    assert len(seen) == 2
    assert seen[0][0] == "hard"
    assert torch.equal(seen[0][1], torch.eye(3).repeat_interleave(2, 0))
    assert not torch.equal(with_term.synthetic.images, run(tmp_path, 2).synthetic.images)


def test_half_precision_of_the_trainer_changes_little(tmp_path):
    whole = run(tmp_path, 2)
    half = run(tmp_path, trainer=tiny_trainer(tmp_path, 2, callbacks=[], precision="bf16-mixed"))
    assert float((whole.synthetic.images - half.synthetic.images).abs().mean()) < 0.02


def test_a_teacher_without_batch_normalisation_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", None)
    with pytest.raises(UserError, match=r"its teacher 'convnet:width=4' keeps none: choose one with batch norm"):
        run(tmp_path, teacher=Teacher("convnet:width=4"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "learned"}, "labels of SRe2L must be one of hard, soft, got 'learned'"),
        ({"bn_weight": -1.0}, "bn_weight must be at least 0, got -1.0"),
        ({"jitter": -1}, r"jitter must be at least 0, or a pair of the smallest and the largest roll, got -1"),
        ({"voters": 2}, "voters must be from 1 to the number of teachers in all, 1, got 2"),
        ({"logits_from": "primary"}, "voters must be from 1 to the number of teachers beside its main one, 0, got 1"),
        ({"residual": 0.5}, "residual and coarse are of runs in several stages: set stages to 2 or more"),
        ({"residual": 0.5, "stages": 2}, "init must be real or patches, not noise"),
        ({"coarse": 0.0, "stages": 2}, r"coarse must be in \(0, 1\], got 0.0"),
        ({"logits_from": "first"}, "unknown logits_from 'first'"),
        ({"min_scale": 0.0}, r"min_scale must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        SRe2L(**(TINY | settings))


def test_a_library_network_with_batch_normalisation_is_seen():
    network = build_network("resnet18:channels=[4,4,4,4],layers=[1,1,1,1]", 3, (1, 8, 8), seed=0)
    rest(network)
    assert float(measured(network, torch.randn(4, 1, 8, 8))) > 0

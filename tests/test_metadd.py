"""MetaDD attached to a distiller: from configuration alone, on time, exact to resume, and the same on two processes."""

import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import LinearNetwork, TinyData, tiny_trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from safetensors.torch import save_file

from lightning_dd.callbacks import MetaDD, MetaFeatureImages, PoolAlternation
from lightning_dd.callbacks.architectures import Look
from lightning_dd.callbacks.pictures import feature_figure
from lightning_dd.distillers import DM, FRePo, PoolDistiller
from lightning_dd.distillers.base import Probe
from lightning_dd.losses.meta_features import focus_weights
from lightning_dd.losses.metadd import MetaOptions, label_distribution
from lightning_dd.losses.metadd_gradient import gathered_loss, naive_loss
from lightning_dd.pretrained import ClassifierRecipe, Task, trained_classifier
from lightning_dd.synthetic import Pixels
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator

ARCHITECTURES = ["conv:width=4,depth=2,norm=none", "convnet:width=4,depth=2", "alexnet:width=4"]
TINY = {
    "architecture": "conv:width=4,depth=2",
    "real_batch_size": 8,
    "pool_size": 2,
    "lifetime": 4,
    "probe": Probe(steps=3),
}


class SixteenPixels(TinyData):
    """Large enough for an AlexNet."""

    side = 16


def metadd(**changes):
    """MetaDD of every step and all architectures; terms and switches of the loss go where they belong."""
    loss = {name: changes.pop(name) for name in list(changes) if name in MetaOptions.__dataclass_fields__}
    plain = {"scale": "absolute", "augment": "none", "every": 1, "per_step": None, "loss": MetaOptions(**loss)}
    training = ClassifierRecipe(steps=40, lr=1e-2)
    return MetaDD(**({"architectures": ARCHITECTURES, "training": training} | plain | changes))


def fit(folder, callback, steps=4, model=None, data=None, **kwargs):
    model = model or FRePo(**TINY)
    callbacks = [PoolAlternation(), callback, *kwargs.pop("callbacks", [])]
    trainer = tiny_trainer(folder, steps, callbacks=callbacks, log_every_n_steps=1, **kwargs)
    trainer.fit(model, data or SixteenPixels(val_fraction=0.25), ckpt_path=kwargs.get("ckpt_path"))
    return model, trainer


def test_the_term_joins_the_outer_loss_and_changes_the_result(tmp_path):
    model, trainer = fit(tmp_path, metadd())
    plain = FRePo(**TINY)
    tiny_trainer(tmp_path, 4).fit(plain, SixteenPixels(val_fraction=0.25))
    assert not torch.equal(model.synthetic.images, plain.synthetic.images)
    logged = trainer.callback_metrics
    total = logged["outer/krr"] + logged["outer/label"] + logged["outer/metadd"]
    torch.testing.assert_close(logged["outer/loss"], total)
    for name in ("variance", "cross_entropy", "kl", "meta_ratio", "map_entropy", "dead_maps"):
        assert f"metadd/{name}" in logged
    trainer = tiny_trainer(tmp_path, 4)
    trainer.fit(model, SixteenPixels(val_fraction=0.25))
    assert "outer/metadd" not in trainer.callback_metrics  # the term belongs to the run and not to the distiller


def test_terms_are_logged_also_where_no_logging_step_carries_them(tmp_path):
    callback = metadd(every=2, scale="steady")
    callbacks = [PoolAlternation(), callback]
    trainer = tiny_trainer(tmp_path, 4, callbacks=callbacks, log_every_n_steps=2)  # at 1 and 3; the term is at 0 and 2
    trainer.fit(FRePo(**TINY), SixteenPixels(val_fraction=0.25))
    assert {"metadd/variance", "metadd/steady", "metadd/loss"} <= set(trainer.callback_metrics)


def test_maps_that_no_term_needs_are_made_for_what_is_logged_alone(tmp_path, monkeypatch):
    made = []
    kept = gathered_loss

    def counted(*arguments):
        made.append(arguments[-1])
        return kept(*arguments)

    monkeypatch.setattr("lightning_dd.callbacks.metadd.gathered_loss", counted)
    callbacks = [PoolAlternation(), metadd(variance=0.0, kl=0.0, every=2)]
    trainer = tiny_trainer(tmp_path, 10, callbacks=callbacks, log_every_n_steps=5)  # at 4 and 9; terms at 0, 2, 4, 6, 8
    trainer.fit(FRePo(**TINY), SixteenPixels(val_fraction=0.25))
    assert made == [False, False, True, False, True]
    assert "metadd/meta_ratio" in trainer.callback_metrics


def test_maps_and_masks_are_drawn_before_and_after(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run", version="v")
    fit(tmp_path, metadd(), callbacks=[MetaFeatureImages()], logger=logger)
    for name in ("meta_initial.png", "meta_final.png"):
        assert (tmp_path / "run" / "v" / name).read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "run" / "v"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert {event.step for event in events.Images("metadd/features")} == {0, 4}
    assert {"metadd/variance", "metadd/meta_ratio", "metadd/meta_ratio_of_all"} <= set(events.Tags()["scalars"])
    with pytest.raises(UserError, match="needs MetaDD among the callbacks"):
        fit(tmp_path, PoolAlternation(), callbacks=[MetaFeatureImages()])


def test_a_weight_of_zero_is_the_base_method_bit_for_bit(tmp_path):
    model, _ = fit(tmp_path, metadd(weight=0.0))
    plain = FRePo(**TINY)
    tiny_trainer(tmp_path, 4).fit(plain, SixteenPixels(val_fraction=0.25))
    assert torch.equal(model.synthetic.images, plain.synthetic.images)


@pytest.mark.parametrize("scale", ["absolute", "norm"])
def test_any_subclass_gets_it_without_a_line(scale, tmp_path):
    class Third(PoolDistiller):
        def outer_loss(self, network, images, labels, real):
            return {"size": images.square().mean()}

    _, trainer = fit(tmp_path, metadd(scale=scale), model=Third(**TINY))
    assert "outer/metadd" in trainer.callback_metrics


def test_the_gradient_in_a_run_is_that_of_all_architectures_at_once(tmp_path):
    callback = metadd(weight=0.5, move_labels=True)
    model, trainer = fit(tmp_path, callback, 0)
    callback.setup(trainer, model, "fit")
    images, labels = (part.detach().requires_grad_() for part in model.synthetic())
    callback.add(trainer, model, images, labels, images.sum())[1]["metadd"].backward()
    again = [part.detach().clone().requires_grad_() for part in (images, labels)]
    (0.5 * naive_loss(callback.architectures, *again, "learned", callback.options).loss).backward()
    for ours, naive in zip((images, labels), again, strict=True):
        torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-4, atol=1e-7)
    for architecture in callback.architectures:
        assert all(parameter.grad is None for parameter in architecture.network.parameters())


def test_a_relative_weight_is_a_share_of_the_methods_own_gradient(tmp_path):
    callback = metadd(weight=0.3, scale="norm", rows=2)
    model, trainer = fit(tmp_path, callback, 0)
    callback.setup(trainer, model, "fit")
    for scale in (1.0, 1000.0):
        images, labels = (part.detach().requires_grad_() for part in model.synthetic())
        slope = scale * torch.linspace(0, 1, images.numel()).view_as(images)
        term = callback.add(trainer, model, images, labels, (images * slope).sum())[1]["metadd"]
        assert float(torch.autograd.grad(term, images)[0].norm()) == pytest.approx(0.3 * float(slope.norm()), rel=1e-4)


@pytest.mark.parametrize("move_labels", [False, True])
def test_learned_labels_are_the_methods_own_unless_told(move_labels, tmp_path):
    callback = metadd(move_labels=move_labels)
    model, trainer = fit(tmp_path, callback, 0)
    callback.setup(trainer, model, "fit")
    images, labels = (part.detach() for part in model.synthetic())
    labels = labels + torch.linspace(0, 1, labels.numel()).view_as(labels)  # no longer one-hot, where the slope is 0
    images.requires_grad_(), labels.requires_grad_()
    term = callback.add(trainer, model, images, labels, images.sum())[1]["metadd"]
    by_images, by_labels = torch.autograd.grad(term, [images, labels], allow_unused=True)
    assert by_images.any()
    assert (by_labels is not None and bool(by_labels.any())) == move_labels


def test_a_steady_weight_is_a_share_of_what_is_steady_in_the_methods_gradient(tmp_path):
    callback = metadd(scale="steady")
    model, trainer = fit(tmp_path, callback, 0)
    generator = torch.Generator().manual_seed(0)

    def size(slope):
        images, labels = (part.detach().requires_grad_() for part in model.synthetic())
        term = callback.add(trainer, model, images, labels, (images * slope).sum())[1]["metadd"]
        return float(torch.autograd.grad(term, images)[0].norm() / slope.norm())

    def sizes(noise, count=24):
        callback.setup(trainer, model, "fit")  # a fit begins anew
        draws = [torch.randn(model.synthetic.images.shape, generator=generator) for _ in range(count)]
        return [size(1 + noise * draw) for draw in draws]

    assert sizes(0.0, 3) == pytest.approx([0, 1, 1], abs=1e-3)
    assert float(model._watched["metadd/steady"]) == pytest.approx(1, abs=1e-3)
    assert sizes(1.0)[-1] == pytest.approx(0.5**0.5, abs=0.03)
    assert sizes(100.0)[-1] < 0.15


def test_a_relative_weight_leaves_the_methods_own_gradient_as_it_is(tmp_path):
    callback = metadd(weight=0.3, scale="norm")
    model, trainer = fit(tmp_path, callback, 0)
    callback.setup(trainer, model, "fit")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def own_loss():
        images, labels = model.synthetic()
        return images, labels, (images.square().sum() + 3 * labels.exp().sum()) * images.mean()

    wanted = torch.autograd.grad(own_loss()[2], parameters)
    own, _ = callback.add(trainer, model, *own_loss())
    assert len(parameters) == 2
    for found, expected in zip(torch.autograd.grad(own, parameters), wanted, strict=True):
        torch.testing.assert_close(found, expected)


class Coarse(Pixels):
    """Images of half the side, enlarged: the images are not what is learned."""

    def build(self, classes, task):
        channels, height, width = task.facts.image_shape
        self.images = torch.nn.Parameter(torch.zeros(len(classes), channels, height // 2, width // 2))

    def start(self, init, train, ipc, generator):
        self.images.data.copy_(torch.randn(self.images.shape, generator=generator))

    def render(self):
        return torch.nn.functional.interpolate(self.images, scale_factor=2)


@pytest.mark.parametrize("parameterisation", [None, Coarse()])
@pytest.mark.parametrize("scale", ["absolute", "norm"])
def test_the_methods_gradient_is_held_to_the_meta_features_and_keeps_its_size(scale, parameterisation, tmp_path):
    callback = metadd(focus=0.8, weight=0.3, scale=scale, augment="crop")
    model, trainer = fit(tmp_path, callback, 0, model=FRePo(**TINY, parameterisation=parameterisation))
    callback.setup(trainer, model, "fit")
    learned = [model.synthetic.parameterisation.images, model.synthetic.labels]
    images, labels = model.synthetic()
    slope = torch.linspace(-1, 1, images.numel()).view_as(images)
    loss, terms = callback.add(trainer, model, images, labels, (images * slope).sum() + 3 * labels.sum())
    assert loss.item() == pytest.approx(((images * slope).sum() + 3 * labels.sum()).item())
    by_images, by_labels = torch.autograd.grad(loss, learned, retain_graph=True)
    weights = focus_weights(slope, callback.shared_map(images, labels, "learned", 0), 0.8)
    assert float(weights.amin()) < 0.9 < 1.1 < float(weights.amax())
    focused = slope * weights
    torch.testing.assert_close(focused.flatten(1).norm(dim=1), slope.flatten(1).norm(dim=1))
    expected = torch.autograd.grad(model.synthetic()[0], learned[0], focused)[0]
    torch.testing.assert_close(by_images, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(by_labels, torch.full_like(by_labels, 3.0))
    if scale == "norm" and parameterisation is None:
        by_term = torch.autograd.grad(terms["metadd"], images)[0]
        assert float(by_term.norm()) == pytest.approx(0.3 * float(slope.norm()), rel=1e-4)


def test_the_mask_can_be_all_that_is_added_and_keeps_the_terms_rhythm(tmp_path):
    whole = tiny_trainer(tmp_path, 4)
    whole.fit(plain := FRePo(**TINY), SixteenPixels(val_fraction=0.25))
    alone = {"architectures": ARCHITECTURES[0], "variance": 0.0, "kl": 0.0}  # one that looks alone is EDF's form
    for settings, differs in (
        ({"weight": 0.0, "layers": "both"}, True),
        (alone | {"weight": 0.0}, True),
        ({"start": 4}, False),
    ):
        model, trainer = fit(tmp_path, metadd(focus=1.0, **settings))
        assert torch.equal(model.synthetic.images, plain.synthetic.images) != differs
        assert "outer/metadd" not in trainer.callback_metrics
        assert ("metadd/shared" in trainer.callback_metrics) == differs


def test_what_the_architectures_see_may_be_augmented_and_is_the_same_after_a_restart(tmp_path):
    runs = [fit(tmp_path, metadd(weight=1.0, augment=augment))[0] for augment in ("crop", "crop", "none")]
    images = [model.synthetic.images for model in runs]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_several_views_are_a_mean_over_views_each_drawn_for_itself(tmp_path):
    callback = metadd(views=3, augment="crop", **{"variance": 0.0, "kl": 0.0})
    model, trainer = fit(tmp_path, callback, 1)
    images, labels = model.synthetic()
    found = callback.add(trainer, model, images, labels, images.sum())[1]["metadd"]
    seen = [
        callback.augmentation(images, make_generator(callback.seed, "augment", *stream))
        for stream in ((1,), (1, 1), (1, 2))  # the first is what one view would be
    ]
    assert not torch.equal(seen[0], seen[1])
    expected = torch.stack([callback.measure(view, labels, "learned").loss for view in seen]).mean()
    torch.testing.assert_close(found, expected)


def test_the_clock_says_which_steps_carry_it():
    callback = metadd(weight=2.0, every=3, start=4, warmup=6)
    weights = [round(callback.weight_at(step), 3) for step in range(14)]
    assert weights == [0, 0, 0, 0, 0.333, 0, 0, 1.333, 0, 0, 2.0, 0, 0, 2.0]


def test_rows_are_drawn_by_step_and_shared_by_ranks():
    class Place:
        def __init__(self, step, rank, world):
            self.global_step, self.global_rank, self.world_size = step, rank, world

    callback = metadd(rows=5)
    whole = callback._rows(Place(3, 0, 1), 12)
    parts = [callback._rows(Place(3, rank, 2), 12) for rank in (0, 1)]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    assert not torch.equal(whole, callback._rows(Place(4, 0, 1), 12))
    assert metadd()._rows(Place(0, 0, 1), 12) is None


def test_a_few_architectures_look_in_a_step_and_all_in_turn():
    callback = metadd(per_step=2)
    callback.architectures = list(ARCHITECTURES)
    drawn = [callback.looking_at(step) for step in range(20)]
    assert all(len(set(names)) == 2 for names in drawn)
    assert {name for names in drawn for name in names} == set(ARCHITECTURES)
    assert drawn == [callback.looking_at(step) for step in range(20)]
    assert metadd().looking_at(0) == []


def test_one_architecture_may_look_where_no_maps_are_compared(tmp_path):
    callback = metadd(per_step=1, variance=0.0, kl=0.0, architectures={ARCHITECTURES[0]: 0.9, ARCHITECTURES[1]: 0.1})
    model, _ = fit(tmp_path, callback)
    assert torch.isfinite(model.synthetic.images).all()
    first = [callback.looking_at(step)[0].name == ARCHITECTURES[0] for step in range(200)]
    assert 0.8 < sum(first) / 200 < 0.97
    kinds = metadd(looks={ARCHITECTURES[1]: Look(cam="gradcam")})
    fit(tmp_path, kinds, 1)
    assert [architecture.cam for architecture in kinds.architectures] == [None, "gradcam", None]


CLOM = {"variance": 0.0, "kl": 0.0, "per_step": 1, "weight": 200.0}  # the rest of its form is metadd()'s own
MATCHING = {"architecture": "convnet:width=4,depth=2", "ipc": 2, "real_per_class": 4, "probe": Probe(steps=3)}


@pytest.mark.parametrize(("cls", "settings"), [(DM, MATCHING), (FRePo, TINY)])
def test_cloms_form_is_a_setting_for_any_method(cls, settings, tmp_path):
    callback = metadd(**CLOM)
    model, trainer = fit(tmp_path, callback, 3, model=cls(**settings))
    plain = cls(**settings)
    tiny_trainer(tmp_path, 3).fit(plain, SixteenPixels(val_fraction=0.25))
    assert not torch.equal(model.synthetic.images, plain.synthetic.images)
    assert "outer/metadd" in trainer.callback_metrics  # the last step carries it as every step does
    images, labels = (part.detach() for part in model.synthetic())
    images.requires_grad_()
    term = callback.add(trainer, model, images, labels, images.sum())[1]["metadd"]
    (architecture,) = callback.looking_at(3)
    target = label_distribution(labels, model.label_kind)
    by_hand = 200 * torch.nn.functional.cross_entropy(architecture.network(images), target)
    torch.testing.assert_close(term, by_hand)
    gradients = [torch.autograd.grad(value, images)[0] for value in (term, by_hand)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_whitened_images_are_unwhitened_for_the_architectures(tmp_path):
    callback = metadd()
    data = SixteenPixels(val_fraction=0.25, preprocessing="zca")
    fit(tmp_path, callback, 1, data=data)
    adapt = callback.architectures[0].adapt
    raw = SixteenPixels().read(train=True).images.float() / 255
    mean, std = data.preprocessing.mean, data.preprocessing.std
    torch.testing.assert_close(adapt(data.preprocessing(raw)), (raw - mean) / std, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kwargs", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.01}])
def test_mixed_precision_and_clipping(tmp_path, kwargs):
    model, _ = fit(tmp_path, metadd(), **kwargs)
    assert torch.isfinite(model.synthetic.images).all()


@pytest.mark.parametrize("attached", [False, True])
def test_a_distillers_own_network_is_the_consensus_and_sees_the_same_view(attached, tmp_path, monkeypatch):
    callback = metadd(consensus="distiller", detach_consensus=not attached, augment="crop")
    model, trainer = fit(tmp_path, callback)
    assert torch.isfinite(model.synthetic.images).all()
    seen = []

    def look(images):
        seen.append(images)
        return linear(images.flatten(1))

    linear = torch.nn.Linear(16 * 16, model.facts.num_classes).requires_grad_(False)
    monkeypatch.setattr(FRePo, "network", property(lambda self: look))
    images, labels = (part.detach().requires_grad_() for part in model.synthetic())
    callback.add(trainer, model, images, labels, images.sum())[1]["metadd"].backward()
    (view,) = seen
    assert not torch.equal(view, images)
    assert view.requires_grad == attached
    again = images.detach().clone().requires_grad_()
    cropped = callback.augmentation(again, make_generator(callback.seed, "augment", trainer.global_step))
    torch.testing.assert_close(view, cropped)
    consensus = linear(cropped.flatten(1))
    arguments = (callback.architectures, cropped, labels.detach(), "learned", callback.options, consensus)
    naive_loss(*arguments).loss.backward()
    torch.testing.assert_close(images.grad, again.grad, rtol=1e-4, atol=1e-7)


def test_how_good_the_architectures_are_is_said_logged_and_drawn(tmp_path, caplog):
    caplog.set_level("INFO", "pytorch_lightning")
    callback = metadd()
    fit(tmp_path, callback, 1, callbacks=[MetaFeatureImages(str(tmp_path))])
    for name, accuracy in callback.accuracies.items():
        assert f"MetaDD's {name} is right on {100 * accuracy:.1f} % of the validation split" in caplog.text
    pixels, maps = torch.rand(1, 3, 16, 16), torch.rand(2, 1, 4, 4)
    figure = feature_figure(pixels, maps, ["vit_tiny_patch16_224", "torchvision/googlenet"], accuracies=[0.5, 0.987])
    assert [axis.get_title() for axis in figure.axes[1:3]] == ["vit_tiny\n50.0 %", "googlenet\n98.7 %"]
    figure.canvas.draw()
    for axis in figure.axes:  # large enough to be read at half the size, and none over its neighbour's
        assert axis.title.get_fontsize() >= 12
        assert axis.title.get_window_extent().width < 1.2 * axis.get_window_extent().width


def test_a_resumed_run_equals_the_run_never_interrupted(tmp_path):
    def run(folder, ckpt_path=None, **changes):
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        settings = {"rows": 2, "every": 2, "per_step": 2, "scale": "steady", "focus": 0.5} | changes
        callbacks = [PoolAlternation(), metadd(**settings), keep]
        model = FRePo(**TINY)
        trainer = tiny_trainer(folder, 7, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(model, SixteenPixels(val_fraction=0.25), ckpt_path=ckpt_path)
        return model.synthetic.images

    straight = run(tmp_path / "a")
    assert torch.equal(straight, run(tmp_path / "b", str(tmp_path / "a" / "step=3.ckpt")))
    with pytest.raises(UserError, match=r"of another configuration: metadd\.loss is"):
        run(tmp_path / "c", str(tmp_path / "a" / "step=3.ckpt"), variance=9.0)


@pytest.mark.parametrize("changes", [{}, {"scale": "norm", "per_step": 2, "focus": 0.7}])
def test_two_processes_give_the_gradient_of_one(changes, tmp_path):
    from test_ddp import TWO, KeepRank, SplitBatch, ranks

    for name, kwargs in (("one", {}), ("two", TWO)):
        (tmp_path / name).mkdir()
        keep = KeepRank(tmp_path / name)
        model = SplitBatch(**(TINY | {"ipc": 2}))
        data = SixteenPixels(val_fraction=1 / 3)  # 24 training images: equal halves
        fit(tmp_path / name, metadd(**changes), 1, model=model, data=data, callbacks=[keep], **kwargs)
    (one,), two = ranks(tmp_path / "one", 1), ranks(tmp_path / "two")
    for rank in two:
        # Cross-entropy and KL are means over rows, and so is the variance: shares of three rows average exactly.
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-3, atol=1e-6)


# ---- the architectures -------------------------------------------------------------------------------------------


def task(**changes):
    data = SixteenPixels(val_fraction=0.25, **changes)
    data.setup("fit")
    return Task.of(data)


def test_an_architecture_is_trained_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))
    recipe = ClassifierRecipe(steps=40, lr=1e-2)
    first, accuracy = trained_classifier(ARCHITECTURES[0], task(), recipe, seed=0)
    assert accuracy > 0.6
    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", lambda *args: pytest.fail("trained again"))
    second, again = trained_classifier(ARCHITECTURES[0], task(), recipe, seed=0)
    assert again == accuracy
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)
        assert not right.requires_grad
    for other in ({"seed": 1}, {"seed": 0, "task": task(mirror=False)}, {"seed": 0, "task": task(preprocessing="zca")}):
        with pytest.raises(BaseException, match="trained again"):
            trained_classifier(ARCHITECTURES[0], recipe=recipe, **({"task": task()} | other))
    (file,) = (tmp_path / "cache" / "classifiers").glob("*.safetensors")
    _, given = trained_classifier(ARCHITECTURES[0], task(), recipe, seed=7, file=file)
    assert given == accuracy
    facts = replace(task().facts, fingerprint="different")
    with pytest.raises(UserError, match="is of other data"):
        trained_classifier(ARCHITECTURES[0], replace(task(), facts=facts), recipe, 0, file)
    with pytest.raises(UserError, match="is of other architecture"):
        trained_classifier(ARCHITECTURES[1], task(), recipe, 0, file)


def test_two_runs_that_ask_for_one_architecture_train_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))
    trained, begun = [], threading.Event()

    def slowly(architecture, network, *args):
        trained.append(architecture)
        begun.set()
        time.sleep(0.3)
        return 1.0

    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", slowly)
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 1.0)
    ask = partial(trained_classifier, ARCHITECTURES[0], task(), ClassifierRecipe(steps=1), seed=5)
    other = threading.Thread(target=ask)
    other.start()
    begun.wait(10)
    ask()
    other.join()
    assert trained == [ARCHITECTURES[0]]


def test_an_architecture_at_chance_is_refused_and_not_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))
    wrong = lambda network, split, device: -torch.nn.functional.one_hot(split.labels.cpu())  # noqa: E731
    monkeypatch.setattr("lightning_dd.pretrained.classifier.answers", wrong)
    with pytest.raises(UserError, match=r"'convnet:width=4,depth=2' is at chance on the validation split"):
        trained_classifier(ARCHITECTURES[1], task(), ClassifierRecipe(steps=1), seed=3)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_foreign_files_are_refused(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    for file, message in (
        (foreign, "do not fit images"),
        (text, "is not a safetensors file"),
        (tmp_path / "no", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            trained_classifier(ARCHITECTURES[0], task(), ClassifierRecipe(steps=1), 0, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ARCHITECTURES[:1]}, "at least 2 architectures to compare, got 1"),
        ({"variance": -1.0}, "weight variance must be at least 0"),
        ({"weight": -1.0}, "metadd.weight must be at least 0, got -1.0"),
        ({"views": 2}, "metadd.views=2 are all the same without an augmentation: metadd.augment must be auto"),
        ({"layers": "first"}, "unknown metadd layers 'first'"),
        ({"focus": 1.5}, r"metadd.focus must be in \[0, 1\], got 1.5"),
        ({"every": 0}, "metadd.every must be at least 1, got 0"),
        (
            {"per_step": 1},
            r"per_step must be from 2 \(they are compared\) to the number of architectures",
        ),
        ({"per_step": 1, "variance": 0.0}, r"per_step must be from 2 \(they are compared\)"),  # an ensemble of one
        (
            {"per_step": 4, "variance": 0.0, "kl": 0.0},
            "per_step must be from 1 to .*, 3, or none, got 4",
        ),
        ({"threshold": 2.0}, r"threshold must be in \(0, 1\]"),
        ({"consensus": "crowd"}, "unknown metadd consensus 'crowd'"),
        ({"looks": {"resnet18": Look(layer="layer4")}}, "metadd.looks names 'resnet18', which is none of its archite"),
        ({"scale": "large"}, "unknown metadd scale 'large'"),
    ],
)
def test_bad_settings_are_refused_at_once(changes, message):
    with pytest.raises(UserError, match=message):
        metadd(**changes)


def test_an_unknown_layer_and_a_missing_validation_split_give_one_line(tmp_path):
    with pytest.raises(UserError, match="layer"):
        fit(tmp_path, metadd(looks={ARCHITECTURES[0]: Look(layer="convs.9")}))
    with pytest.raises(UserError, match="needs a validation split"):
        fit(tmp_path, metadd(), data=SixteenPixels(val_fraction=0))


def test_a_network_without_a_map_is_refused():
    from lightning_dd.losses.cam import class_activation_map
    from lightning_dd.models.pool import rest

    network = LinearNetwork()
    rest(network)
    with pytest.raises(UserError, match="map"):
        class_activation_map(network, torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))

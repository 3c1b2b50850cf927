"""DC, DSA and DM: distances by hand, siamese augmentation, gradients, the clock, batch statistics, resuming."""

import math

import pytest
import torch
from helpers import LinearNetwork, TinyData, tiny_trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dd.augment.frepo import apply
from lightning_dd.augment.siamese import TRANSFORMS, siamese
from lightning_dd.callbacks import PoolAlternation
from lightning_dd.data import Batch
from lightning_dd.distillers import DC, DM, DSA
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.dc import LOOPS
from lightning_dd.distillers.matching import measure_batch_statistics
from lightning_dd.losses.labels import student_loss
from lightning_dd.losses.matching import class_mean_distance, gradient_distance
from lightning_dd.models import build_network
from lightning_dd.models.pool import rest
from lightning_dd.utils.errors import UserError

TINY = {"architecture": "convnet:width=4,depth=2", "real_per_class": 6, "probe": Probe(steps=2)}
METHODS = (DC, DSA, DM)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fitted(tmp_path, cls, steps, data=None, trainer=None, **settings):
    model = cls(**(TINY | settings))
    (trainer or tiny_trainer(tmp_path, steps)).fit(model, data or TinyData())
    return model


def batch(shape=(1, 8, 8), ipc=2, per_class=5, classes=3, dtype=torch.float32):
    """Synthetic images, hard labels and real images in blocks by class."""
    images = torch.randn(classes * ipc, *shape, generator=generator(1)).to(dtype)
    labels = torch.eye(classes, dtype=dtype).repeat_interleave(ipc, 0)
    real = torch.randn(classes * per_class, *shape, generator=generator(2)).to(dtype)
    return images, labels, Batch(real, torch.arange(classes).repeat_interleave(per_class))


# ---- the distances -----------------------------------------------------------------------------------------------


def test_the_gradient_distance_is_one_minus_the_cosine_of_every_row():
    shapes = [(4, 3, 3, 3), (4,), (2, 6), (2,), (1, 5, 7)]
    ours, theirs = ([torch.randn(shape, generator=generator(seed)) for shape in shapes] for seed in (0, 1))
    expected = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.ndim == 1:
            continue
        for row in range(a.shape[0]):
            left, right = a[row].flatten().tolist(), b[row].flatten().tolist()
            dot = sum(x * y for x, y in zip(left, right, strict=True))
            norms = math.sqrt(sum(x * x for x in left)) * math.sqrt(sum(y * y for y in right))
            expected += 1 - dot / (norms + 1e-6)
    assert float(gradient_distance(ours, theirs)) == pytest.approx(expected, rel=1e-6)


def test_biases_count_nothing_and_tiny_gradients_meet_the_constant_in_the_denominator():
    a, b = [torch.ones(2, 3), torch.randn(5)], [torch.ones(2, 3), torch.randn(5)]
    assert float(gradient_distance(a, b)) == pytest.approx(0, abs=1e-5)
    small = [torch.full((1, 1), 1e-3, dtype=torch.float64)]  # the product of the norms is the constant itself
    assert float(gradient_distance(small, small)) == pytest.approx(0.5)
    dead = [torch.zeros(1, 4, requires_grad=True)]
    value = gradient_distance(dead, [torch.ones(1, 4)])
    value.backward()
    assert float(value.detach()) == 1
    assert torch.isfinite(dead[0].grad).all()


def test_distances_of_half_precision_are_computed_in_float32():
    a, b = (torch.randn(3, 50, generator=generator(seed)).bfloat16() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(gradient_distance([a], [b])) == float(gradient_distance([a.float()], [b.float()]))
        assert float(class_mean_distance(a, b, 3)) == float(class_mean_distance(a.float(), b.float(), 3))


def test_the_mean_distance_is_that_of_explicit_class_means():
    own, real = torch.randn(6, 4, generator=generator(0)), torch.randn(15, 4, generator=generator(1))
    expected = sum(
        float((own[2 * c : 2 * c + 2].mean(0) - real[5 * c : 5 * c + 5].mean(0)).norm() ** 2) for c in range(3)
    )
    assert float(class_mean_distance(own, real, 3)) == pytest.approx(expected, rel=1e-5)


# ---- siamese augmentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_image_comes_out_the_same_in_both_batches_and_other_draws_change_it_otherwise(name):
    image = torch.randn(1, 3, 16, 16, generator=generator())
    first = torch.cat([torch.randn(4, 3, 16, 16, generator=generator(1)), image])
    second = torch.cat([image, torch.randn(1, 3, 16, 16, generator=generator(2))])
    augment, source, outcomes = siamese(name), generator(3), set()
    for _ in range(30):
        draw = augment.draw(source)
        one, two = apply(first, draw)[-1], apply(second, draw)[0]
        assert torch.equal(one, two)
        outcomes.add(round(float((one * torch.arange(16)).sum()), 3))
    assert len(outcomes) == 2 if name == "flip" else len(outcomes) > 10


@pytest.mark.parametrize("name", TRANSFORMS)
def test_students_get_numbers_of_their_own_for_every_image(name):
    images = torch.randn(1, 3, 16, 16, generator=generator()).repeat(32, 1, 1, 1)
    shared = apply(images, siamese(name).draw(generator(1)))
    own = apply(images, siamese(name, shared=False).draw(generator(1)))
    assert all(torch.equal(image, shared[0]) for image in shared)
    assert len({round(float((image * torch.arange(16)).sum()), 3) for image in own}) > 1


def extremes(name, images):
    """The transform with all numbers at 0, and all just below 1."""
    count = len(images)
    return [TRANSFORMS[name](images, torch.full((3, count), value)) for value in (0.0, 1 - 2**-24)]


def test_the_ranges_are_the_published_ones():
    ones = torch.ones(1, 1, 16, 16)
    dark, bright = extremes("color", torch.cat([ones, -ones], 3))
    assert float(dark.mean()) == pytest.approx(-0.5)
    assert float(bright.mean()) == pytest.approx(0.5)
    assert [float(image.std() / torch.cat([ones, -ones], 3).std()) for image in (dark, bright)] == pytest.approx(
        [0.5, 1.5]
    )
    red = torch.stack([ones, 0 * ones, -ones], 1).flatten(1, 2)
    assert float(extremes("color", red)[0].std()) == pytest.approx(0, abs=1e-6)  # saturation 0 leaves grey
    point = torch.zeros(1, 1, 16, 16)
    point[..., 8, 8] = 1
    places = [tuple((image[0, 0] > 0.5).nonzero()[0].tolist()) for image in extremes("crop", point)]
    assert places == [(10, 10), (6, 6)]  # an eighth of 16 pixels, either way
    assert [int((image == 0).sum()) for image in extremes("cutout", ones)] == [
        16,
        16,
    ]  # a quarter of the hole is inside
    assert int((TRANSFORMS["cutout"](ones, torch.full((3, 1), 0.5)) == 0).sum()) == 64
    mirrored, kept = extremes("flip", point)
    assert torch.equal(mirrored, point.flip(-1))
    assert torch.equal(kept, point)
    grid = torch.linspace(-1, 1, 64)
    disc = ((grid[:, None] ** 2 + grid**2) < 0.25).float().expand(1, 1, 64, 64)
    areas = [float(image.sum() / disc.sum()) for image in extremes("scale", disc)]
    assert areas == pytest.approx([1.2**2, 1.2**-2], rel=0.03)
    bar = ((grid[:, None].abs() < 0.05) & (grid > 0)).float().expand(1, 1, 64, 64)
    for drawn, start in ((bar, 0), (bar.mT, 90)):  # both axes turn the same way, or it would be a shear
        for image, sign in zip(extremes("rotate", drawn), (1, -1), strict=True):
            moments = [(image[0, 0] * axis).sum() for axis in (grid[:, None], grid)]
            assert math.degrees(math.atan2(*moments)) == pytest.approx(start + 15 * sign, abs=0.5)


def test_strategies_are_read_and_digits_are_not_mirrored():
    assert siamese("auto").strategy == "color_crop_cutout_flip_scale_rotate"
    assert siamese("auto", mirror=False).strategy == "color_crop_cutout_scale_rotate"
    assert len(siamese("crop_rotate").operations) == 2
    images = torch.randn(2, 1, 8, 8)
    assert apply(images, siamese("none").draw(generator())) is images
    with pytest.raises(UserError, match="unknown augmentation 'translate'"):
        siamese("crop_translate")


# ---- the objectives ----------------------------------------------------------------------------------------------


class SmoothNetwork(LinearNetwork):
    """Two layers with a smooth bend between them."""

    def features(self, images):
        return self.body(images.flatten(1)).tanh()


def by_hand(network, images, labels, real, kind="hard"):
    """DC's objective as one graph, without a helper of the method."""
    network.requires_grad_(True)
    weights = list(network.parameters())
    total = 0
    for c in range(labels.shape[1]):
        rows, chosen = labels.argmax(1) == c, real.labels == c
        targets = torch.eye(labels.shape[1])[real.labels[chosen]]
        if kind != "hard":
            targets = targets - 1 / labels.shape[1]
        theirs = torch.autograd.grad(student_loss(network(real.images[chosen]), targets, kind), weights)
        ours = torch.autograd.grad(student_loss(network(images[rows]), labels[rows], kind), weights, create_graph=True)
        total = total + gradient_distance(ours, theirs)
    rest(network)
    return total


def is_at_rest(network):
    quiet = not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    return quiet and not any(module.training for module in network.modules())


@pytest.mark.parametrize("kind", ["hard", "centred", "learned"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_dc_equals_one_graph_over_all_classes_and_leaves_the_network_at_rest(norm, kind):
    network = build_network(f"convnet:width=4,depth=2,norm={norm}", 3, (1, 8, 8), seed=0)
    rest(network)
    images, labels, real = batch()
    labels = labels if kind == "hard" else labels - 1 / 3
    model = DC(**TINY, ipc=2, labels=kind)
    results = []
    # First ours: it moves the statistics of batch normalisation, and the other then finds them.
    for objective in (
        lambda *given: model.outer_loss(network, *given)["gradients"],
        lambda *given: by_hand(network, *given, kind),
    ):
        x, y = images.clone().requires_grad_(), labels.clone().requires_grad_(kind == "learned")
        value = objective(x, y, real)
        (2 * value).backward()
        assert is_at_rest(network)
        results.append((value.detach(), x.grad, y.grad))
    assert (results[0][2] is None) == (kind != "learned")
    for left, right in zip(*results, strict=True):
        if left is not None:
            torch.testing.assert_close(left, right, rtol=2e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["hard", "learned"])
def test_dcs_gradient_equals_finite_differences(kind):
    torch.manual_seed(0)
    network = SmoothNetwork().double()
    rest(network)
    images, labels, real = batch(dtype=torch.float64)
    real = Batch(real.images, real.labels)
    labels = labels.float() if kind == "hard" else labels
    model = DC(**TINY, ipc=2, labels=kind)

    def total(x, y):
        return model.outer_loss(network, x, y, real)["gradients"]

    x, y = images.clone().requires_grad_(), labels.clone().requires_grad_(kind == "learned")
    total(x, y).backward()
    for tensor in (x, y):
        if tensor.grad is None:
            continue
        direction = torch.randn(tensor.shape, generator=generator(3)).to(tensor.dtype)
        ends = []
        for step in (1e-3, -1e-3):
            moved = tensor.detach() + step * direction
            ends.append(float(total(moved, labels) if tensor is x else total(images, moved)))
        numeric = (ends[0] - ends[1]) / 2e-3
        assert numeric == pytest.approx(float((tensor.grad * direction).sum()), rel=5e-3)


def test_dm_compares_the_class_means_of_features():
    network = build_network("convnet:width=4,depth=2", 3, (1, 8, 8), seed=0)
    rest(network)
    images, labels, real = batch()
    x = images.requires_grad_()
    value = DM(**TINY, ipc=2, augment="none").outer_loss(network, x, labels, real)["means"]
    own, theirs = network.features(x), network.features(real.images)
    expected = sum(
        (own[labels.argmax(1) == c].mean(0) - theirs[real.labels == c].mean(0)).square().sum() for c in range(3)
    )
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-3, atol=1e-5)
    assert is_at_rest(network)


def test_dm_under_batch_normalisation_uses_the_statistics_of_all_classes_together():
    network = build_network("convnet:width=4,depth=2,norm=batch", 3, (1, 8, 8), seed=0)
    rest(network)
    images, labels, real = batch()
    value = DM(**TINY, ipc=2, augment="none").outer_loss(network, images, labels, real)["means"]
    assert is_at_rest(network)
    network.train()
    own, theirs = network.features(images), network.features(real.images)
    torch.testing.assert_close(value, class_mean_distance(own, theirs, 3), rtol=1e-4, atol=1e-5)


def test_dc_measures_batch_statistics_on_sixteen_real_images_of_every_class():
    network = build_network("convnet:width=4,depth=2,norm=batch", 3, (1, 8, 8), seed=0)
    rest(network)
    images, labels, real = batch(per_class=20)
    few = torch.cat([real.images[20 * c : 20 * c + 16] for c in range(3)])
    DC(**TINY, ipc=2).outer_loss(network, images, labels, real)
    measured = network.norms[0].running_mean / network.norms[0].momentum
    torch.testing.assert_close(measured, network.convs[0](few).mean((0, 2, 3)))
    assert is_at_rest(network)
    plain = build_network("convnet:width=4,depth=2", 3, (1, 8, 8), seed=0)
    rest(plain)
    plain.register_forward_hook(lambda *_: pytest.fail("without batch normalisation nothing is to be measured"))
    measure_batch_statistics(plain, real.images, 3)


@pytest.mark.parametrize("cls", [DSA, DM])
def test_real_and_synthetic_images_of_a_class_are_changed_alike(cls, tmp_path):
    """Where each class's synthetic images are its real ones, both distances vanish, whatever is drawn."""

    class Twin(cls):
        def draw_real(self):
            return Batch(self.synthetic.images.detach().clone(), self.synthetic.classes)

        def outer_loss(self, network, images, labels, real):
            terms = super().outer_loss(network, images, labels, real)
            values.append(sum(terms.values()).detach())
            return terms

    values = []
    fitted(tmp_path, Twin, 8, ipc=2, **({"inner_steps": 1} if cls is DSA else {}))
    assert torch.stack(values).abs().max() < 0.05  # not 0: the constant in the denominator; otherwise above 1
    plain = fitted(tmp_path, cls, 1, ipc=2)
    seen = {plain.siamese.draw(plain.step_generator("siamese")).seed, *(d.seed for d in plain.draw_siamese(3))}
    assert len(seen) == 3  # every class its own draw, and they are those of the step


@pytest.mark.parametrize("cls", METHODS)
def test_labels_that_are_not_learned_stay_and_no_gradient_stays_on_a_network(cls, tmp_path):
    start, model = fitted(tmp_path, cls, 0), fitted(tmp_path, cls, 2)
    assert [name for name, _ in model.named_parameters()] == ["synthetic.parameterisation.images"]
    assert torch.equal(model.synthetic.labels, start.synthetic.labels)
    assert not torch.equal(model.synthetic.images, start.synthetic.images)
    assert is_at_rest(model.network)


def test_learned_labels_are_learned(tmp_path):
    start, model = (fitted(tmp_path, DC, steps, labels="learned", init="real") for steps in (0, 2))
    assert not torch.equal(model.synthetic.labels, start.synthetic.labels)


@pytest.mark.parametrize("cls", METHODS)
def test_mixed_precision_runs_and_its_distance_is_close(cls, tmp_path):
    values = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = tiny_trainer(tmp_path, 1, precision=precision)
        model = fitted(tmp_path, cls, 1, trainer=trainer, architecture="convnet:width=8,depth=2", init="real")
        assert model.synthetic.images.dtype == torch.float32
        values.append(model.synthetic.images.detach())
    change = values[1] - values[0]
    start = fitted(tmp_path, cls, 0, architecture="convnet:width=8,depth=2", init="real").synthetic.images.detach()
    assert float(change.norm() / (values[0] - start).norm()) < 0.2


# ---- the loop ----------------------------------------------------------------------------------------------------


class Watched(DC):
    """Writes down what happens, and under which weights."""

    def outer_loss(self, network, images, labels, real):
        self.calls.append(("outer", float(network.head.weight[0, 0])))
        return super().outer_loss(network, images, labels, real)

    def inner_loss(self, network):
        self.calls.append(("inner", None))
        return super().inner_loss(network)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []


def test_with_one_image_per_class_every_outer_step_has_a_fresh_network(tmp_path):
    model = fitted(tmp_path, Watched, 4)
    assert [name for name, _ in model.calls] == ["outer"] * 4
    assert len({weight for _, weight in model.calls}) == 4


def test_with_ten_a_network_serves_ten_outer_steps_and_learns_between_them(tmp_path):
    model = fitted(tmp_path, Watched, 12, ipc=10, inner_steps=2)
    names = [name for name, _ in model.calls]
    assert names == [*["outer", "inner", "inner"] * 9, "outer", *["outer", "inner", "inner"] * 2]
    weights = [weight for name, weight in model.calls if name == "outer"]
    assert len(set(weights)) == 12
    again = fitted(tmp_path, Watched, 1, ipc=10, inner_steps=2, seed=1)
    assert again.lifetime == 18
    assert isinstance(again.pool.current.optimizer, torch.optim.SGD)
    assert not again.pool.current.optimizer.defaults["momentum"]


@pytest.mark.parametrize(
    ("ipc", "batch_size", "inner", "lifetime"),
    [(1, 256, 1, 0), (10, 256, 50, 450), (10, 8, 200, 1800), (2, 256, 50, 450)],
)
def test_loops_follow_from_the_images_per_class(tmp_path, ipc, batch_size, inner, lifetime):
    model = fitted(tmp_path, DC, 0, ipc=ipc, inner_batch_size=batch_size)
    assert (model.inner_steps, model.pool.lifetime) == (inner, lifetime)


def test_an_inner_pass_shows_every_synthetic_image_once(tmp_path):
    model = fitted(tmp_path, DC, 1, ipc=4, inner_batch_size=5)
    passes = []
    for start in (0, 3, model.inner_steps):  # two passes after one outer step, and the first after the next
        rows = []
        for age in range(start, start + 3):
            model.pool.current.age = age
            rows.append(model.draw_inner_rows(12, torch.device("cpu")))
        assert [len(batch) for batch in rows] == [5, 5, 2]  # as a loader that keeps its last batch
        assert sorted(torch.cat(rows).tolist()) == list(range(12))
        passes.append(torch.cat(rows).tolist())
    assert passes[0] != passes[1]


def test_the_table_of_loops():
    assert {ipc: (DC(ipc=ipc).outer_loop, DC(ipc=ipc).inner_loop) for ipc in LOOPS} == LOOPS
    assert (DC(ipc=35).outer_loop, DC(ipc=35).inner_loop) == LOOPS[40]
    assert (DC(ipc=100).outer_loop, DC(ipc=100).inner_loop) == LOOPS[50]


def test_dsas_networks_learn_augmented_images_and_dcs_plain_ones(tmp_path):
    for cls, changed in ((DC, False), (DSA, True)):
        model = fitted(tmp_path, cls, 2, init="real")
        images = model.synthetic.images.detach()
        seen = []
        for age in range(5):
            model.pool.current.age = age
            seen.append(model.draw_synthetic()[0])
        assert any(not torch.equal(one, images) for one in seen) == changed
        assert len({float(one.sum()) for one in seen}) > 1 or not changed


def test_dm_sees_another_untrained_network_at_every_step(tmp_path):
    class Spy(DM):
        def outer_loss(self, network, images, labels, real):
            weights.append(float(network.head.weight[0, 0]))
            assert len(real.images) == 3 * 6
            assert torch.equal(real.labels, torch.arange(3).repeat_interleave(6))
            return super().outer_loss(network, images, labels, real)

    weights = []
    fitted(tmp_path, Spy, 5)
    assert len(set(weights)) == 5


@pytest.mark.parametrize(("cls", "key", "lr"), [(DC, "gradients", 1.0), (DSA, "gradients", 1.0), (DM, "means", 1.0)])
def test_distilling_lowers_the_loss_on_networks_it_never_met(cls, key, lr, tmp_path):
    def unseen_loss(model):
        model.siamese = siamese("none")
        model.real_per_class = 100
        images, labels = model.synthetic()
        real, losses = model.draw_real(), []
        for seed in range(8):
            network = model.build_network(1000 + seed)
            rest(network)
            losses.append(float(model.outer_loss(network, images.detach(), labels, real)[key]))
        return sum(losses) / len(losses)

    start, end = (fitted(tmp_path, cls, steps, lr=lr, init="noise") for steps in (0, 40))
    assert unseen_loss(end) < 0.8 * unseen_loss(start)


@pytest.mark.parametrize("cls", [DSA, DM])
def test_a_resumed_run_equals_the_run_never_interrupted(cls, tmp_path):
    def run(folder, model, **kwargs):
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = tiny_trainer(folder, 7, callbacks=[PoolAlternation(), keep], enable_checkpointing=True)
        trainer.fit(model, TinyData(), **kwargs)

    settings = TINY | {"ipc": 10, "inner_batch_size": 8} | ({"inner_steps": 3, "lifetime": 7} if cls is DSA else {})
    straight, resumed = cls(**settings), cls(**settings)
    run(tmp_path, straight)
    run(tmp_path / "b", resumed, ckpt_path=str(tmp_path / "step=3.ckpt"), weights_only=True)
    assert torch.equal(straight.synthetic.images, resumed.synthetic.images)
    assert straight.pool.current.age == resumed.pool.current.age
    assert all(map(torch.equal, straight.network.parameters(), resumed.network.parameters()))
    loaded = cls.load_from_checkpoint(tmp_path / "step=3.ckpt", weights_only=True)
    assert loaded.real_per_class == 6


def test_images_move_by_sgd_with_momentum_one_half(tmp_path):
    model = fitted(tmp_path, DM, 1)
    (optimizer,) = model.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(1.0, 0.5)]
    assert fitted(tmp_path, DC, 0).lr == 0.1


# ---- bad settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (DM, {"labels": "learned"}, "labels of DM must be one of hard, centred, soft, got 'learned'"),
        (DM, {"real_per_class": 0}, "real_per_class must be at least 1, got 0"),
        (DC, {"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        (DSA, {"augment": "blur"}, "unknown augmentation 'blur'"),
        (DC, {"inner_lr": 0.0}, "inner_lr must be positive"),
    ],
)
def test_bad_settings_are_refused_at_once(cls, settings, message):
    with pytest.raises(UserError, match=message):
        cls(**(TINY | settings))


def test_a_clock_that_disagrees_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, 2, callbacks=[PoolAlternation(inner_steps=7)])
    with pytest.raises(UserError, match="PoolAlternation has inner_steps 7, DC with ipc 10 runs 50"):
        trainer.fit(DC(**TINY, ipc=10), TinyData())
    fitted(tmp_path, DC, 2, trainer=tiny_trainer(tmp_path, 2, callbacks=[PoolAlternation(inner_steps=1)]))


def test_a_negative_lifetime_is_refused(tmp_path):
    with pytest.raises(UserError, match="lifetime must be at least 0"):
        fitted(tmp_path, DC, 1, lifetime=-1)

"""Generator latents: rendering, slices, the start, the small generator and its cache, runs, generators of one's own."""

import gc
import weakref

import pytest
import torch
from helpers import TinyData, other_shapes, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_dd.pretrained.generator as pretrained
from lightning_dd.callbacks import MetaDD, PoolAlternation
from lightning_dd.data.cache import cache_folder
from lightning_dd.data.images import DataFacts
from lightning_dd.data.preprocess import Preprocessing, fit_preprocessing
from lightning_dd.distillers import FRePo, Random
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.checkpoint import distilled_from_checkpoint
from lightning_dd.models.generator import Generator
from lightning_dd.pretrained import ClassifierRecipe
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic import Latents, SyntheticSet
from lightning_dd.utils.errors import UserError

STANDARD = Preprocessing([0.3], [0.2])
TINY = Latents(width=4, steps=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(ipc=2, shape=(1, 16, 16), labels="hard", preprocessing=STANDARD, seed=0, **options):
    return latent_set(ipc, shape, labels, preprocessing, seed, **options).parameterisation


def latent_set(ipc=2, shape=(1, 16, 16), labels="hard", preprocessing=STANDARD, seed=0, **options):
    facts = DataFacts("toy", ("a", "b", "c"), shape, preprocessing.kind, "none")
    made = SyntheticSet(Latents(**({"width": 4} | options)), ipc, labels, Task(facts, preprocessing, {}))
    made.parameterisation.start("real", None, ipc, generator(seed))
    return made


def frepo(parameterisation=TINY, **changes):
    settings = {"architecture": "conv:width=4,depth=2", "real_batch_size": 8, "pool_size": 2, "lifetime": 4}
    return FRePo(parameterisation=parameterisation, **(settings | {"probe": Probe(steps=2)} | changes))


# ---- the options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "latents: steps must be a whole number of at least 1, got 0"),
        ({"slice": 2.5}, "latents: slice must be a whole number"),
        ({"lr_styles": 0}, "latents: lr_styles must be positive, got 0"),
        ({"level": -1}, "latents: level must be at least 0, got -1"),
        ({"generator": "my.Own", "level": 1}, "level must be 0 with a generator of your own"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message) as caught:
        Latents(**options)
    assert "\n" not in str(caught.value)


def test_a_level_beyond_the_last_block_and_a_selecting_method_are_refused():
    with pytest.raises(UserError, match=r"level must be 0 to 2 \(the generator's blocks for this image size\), got 3"):
        latents(level=3)
    with pytest.raises(UserError, match="Random selects real images: parameterisation must be one of Pixels, "):
        Random(labels="hard", parameterisation=Latents())


# ---- the generator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 48), (1, 8, 8), (1, 5, 7)])
def test_the_generator_makes_pixels_of_any_size_and_can_be_cut_anywhere(shape):
    made = Generator(4, shape, width=4, latent_size=6)
    z, classes = torch.randn(3, 6, generator=generator()), torch.tensor([0, 3, 1])
    whole = made(z, classes)
    assert whole.shape == (3, *shape)
    assert float(whole.detach().min()) >= 0
    assert float(whole.detach().max()) <= 1
    styles = made.styles(z, classes)
    for level in range(1, made.depth + 1):
        features = made.features(styles, level)
        assert features.shape[1:] == made.feature_shape(level)
        torch.testing.assert_close(made.pixels(features, styles[:, level:], level), whole)
    assert not torch.allclose(made(z, torch.tensor([1, 3, 1]))[0], whole[0])


def test_a_style_without_effect_leaves_a_blocks_normalised_map():
    block = Generator(4, (1, 8, 8), width=4, latent_size=6).blocks[0]
    nn.init.zeros_(block.modulation.weight)
    nn.init.zeros_(block.modulation.bias)
    maps = torch.randn(2, block.conv.in_channels, 4, 4, generator=generator())
    enlarged = nn.functional.interpolate(maps, block.size, mode="nearest")
    expected = nn.functional.leaky_relu(block.norm(block.conv(enlarged)), 0.2)
    torch.testing.assert_close(block(maps, torch.randn(2, block.modulation.in_features)), expected)


# ---- rendering and its gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_rendering_in_slices_equals_one_plain_pass_and_so_does_the_gradient(level, kind):
    pixels = torch.rand(40, 1, 16, 16, generator=generator(1))
    sliced = latents(level=level, slice=4, preprocessing=fit_preprocessing(kind, pixels))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in sliced.latents]
    network = sliced.generator
    if level == 0:
        plain = network.pixels(network.features(leaves[0], 1), leaves[0][:, 1:], 1)
    else:
        plain = network.pixels(*leaves, level)
    plain = fit_preprocessing(kind, pixels)(plain)
    images = sliced.render()
    torch.testing.assert_close(images, plain, rtol=1e-4, atol=1e-4)
    weights = torch.randn(images.shape, generator=generator(2))
    (images.square() * weights).sum().backward()
    (plain.square() * weights).sum().backward()
    for own, leaf in zip(sliced.latents, leaves, strict=True):
        assert float(leaf.grad.abs().max()) > 0
        torch.testing.assert_close(own.grad, leaf.grad, rtol=1e-3, atol=1e-3 * float(leaf.grad.abs().max()))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())


class PeakBytes(TorchDispatchMode):
    """The most bytes of new tensors alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return made

    def gone(self, key, size):
        self.seen.discard(key)
        self.alive -= size


def peak_beyond_images(ipc, slice_):
    """Bytes a gradient takes at most, less the images, latents and their gradients, which are the result."""
    made = latents(ipc=ipc, level=1, slice=slice_)
    gc.collect()
    with PeakBytes() as watched:
        made.render().sum().backward()
    kept = sum(tensor.grad.nbytes for tensor in made.latents)
    return watched.peak - 3 * kept - 3 * len(made.classes) * 256 * 4


def test_memory_grows_with_the_slice_and_not_with_the_set():
    few, many = peak_beyond_images(4, 6), peak_beyond_images(32, 6)
    whole = peak_beyond_images(32, 1000)
    assert whole > 5 * many
    assert many < 1.5 * few


def test_the_images_do_not_depend_on_the_precision_around_them():
    made = latents()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made.render()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, made.render())


def test_no_graph_is_built_where_no_gradient_is_wanted():
    with torch.no_grad():
        assert not latents(slice=2).render().requires_grad


# ---- the start ---------------------------------------------------------------------------------------------------


def test_the_map_is_cleaned_and_clipped_at_the_start_only(monkeypatch):
    real = Generator.features

    def broken(self, styles, level):
        x = real(self, styles, level).clone()
        x[:, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -30.0])
        return x

    monkeypatch.setattr(Generator, "features", broken)
    made = latents(level=1)
    assert made.features[:, 0, 0, :4].detach().unique(dim=0).tolist() == [[0.0, 5.0, -5.0, -10.0]]
    with torch.no_grad():
        made.features.fill_(50.0)
        made.render()
    assert float(made.features.detach().min()) == 50


def test_the_start_is_the_generators_image_of_the_class_and_of_the_seed():
    made = latents(ipc=2, level=2, slice=4)
    z = torch.randn(6, made.latent_size, generator=generator())
    expected = STANDARD(made.generator(z, torch.tensor([0, 0, 1, 1, 2, 2])))
    torch.testing.assert_close(made.render(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(latents(level=2, slice=4).features, made.features)
    assert not torch.equal(latents(level=2, seed=1).features, made.features)


def test_building_a_set_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    latents()
    assert torch.equal(torch.rand(2), expected)


def test_maps_styles_and_labels_have_learning_rates_of_their_own():
    made = latent_set(labels="learned", lr_features=3.0, lr_styles=0.5)
    groups = {group["name"]: (group["lr"], group["params"]) for group in made.parameter_groups(0.1)}
    assert {name: lr for name, (lr, _) in groups.items()} == pytest.approx(
        {"features": 0.3, "styles": 0.05, "labels": 0.1}
    )
    assert all(
        params[0] is getattr(made if name == "labels" else made.parameterisation, name)
        for name, (_, params) in groups.items()
    )
    assert [group["name"] for group in latents(level=0).parameter_groups(0.1)] == ["styles"]


# ---- training the generator --------------------------------------------------------------------------------------


class Colour(TinyData):
    channels = 3


def fitted(tmp_path, model, data=None, steps=3, **kwargs):
    trainer = tiny_trainer(tmp_path, steps, **kwargs)
    trainer.fit(model, data or TinyData())
    return model


@pytest.mark.parametrize("preprocessing", ["standardise", "zca"])
def test_a_trained_generator_shows_the_class_it_is_asked_for(tmp_path, preprocessing):
    data = Colour(preprocessing=preprocessing)
    model = fitted(tmp_path, frepo(Latents(width=8, steps=200, level=1), ipc=10), data, steps=0)
    pixels = model.distilled_set().pixels().flatten(1)
    real = data.preprocessing.inverse(data.train.everything().images).flatten(1)
    means = torch.stack([real[data.train.labels == label].mean(0) for label in range(3)])
    nearest = torch.cdist(pixels, means).argmin(1)
    assert float((nearest == model.synthetic.classes).float().mean()) > 0.9
    assert float(pixels.std(0).mean()) > 0.01  # and not the same image every time


def test_the_generator_is_trained_once_and_shared_between_runs(tmp_path, monkeypatch):
    trained = []
    fit = pretrained.fit
    monkeypatch.setattr(pretrained, "fit", lambda *args: (trained.append(1), fit(*args)))
    space = Latents(width=4, steps=3, seed=5)
    with pytest.raises(UserError, match="train_missing is false"):
        fitted(tmp_path, frepo(space, train_missing=False))
    first = fitted(tmp_path, frepo(space))
    second = fitted(tmp_path, frepo(space, seed=1, train_missing=False, labels="centred"))
    assert trained == [1]
    for name, value in first.synthetic.parameterisation.generator.state_dict().items():
        assert torch.equal(value, second.synthetic.parameterisation.generator.state_dict()[name])
    assert not torch.equal(first.synthetic.parameterisation.features, second.synthetic.parameterisation.features)
    for other in (Latents(width=4, steps=3, seed=6), Latents(width=4, steps=4, seed=5)):
        fitted(tmp_path, frepo(other))
    assert trained == [1, 1, 1]


def test_a_damaged_file_in_the_cache_is_replaced(tmp_path):
    space = Latents(width=4, steps=3, seed=7)
    first = fitted(tmp_path, frepo(space))
    folder = cache_folder() / "generators"
    newest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    whole = newest.read_bytes()
    for damage in (lambda: newest.write_bytes(whole[:100]), lambda: other_shapes(newest)):
        damage()
        second = fitted(tmp_path, frepo(space))
        assert torch.equal(first.synthetic.parameterisation.features, second.synthetic.parameterisation.features)
        assert newest.read_bytes() == whole


def test_a_training_that_diverges_is_said(tmp_path, monkeypatch):
    def diverge(task, networks, *args):
        with torch.no_grad():
            networks[0].start.bias.fill_(float("nan"))

    monkeypatch.setattr(pretrained, "fit", diverge)
    with pytest.raises(UserError, match=r"diverged: lower latents' lr, which is 0\.5"):
        fitted(tmp_path, frepo(Latents(width=4, steps=3, lr=0.5)))


# ---- runs --------------------------------------------------------------------------------------------------------


def checkpointing(folder, steps, every, **kwargs):
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    settings = {"callbacks": [PoolAlternation(), keep], "enable_checkpointing": True}
    return tiny_trainer(folder, steps, **(settings | kwargs))


@pytest.mark.parametrize("labels", ["learned", "centred"])
def test_a_resumed_run_equals_the_run_never_interrupted(tmp_path, labels):
    straight, resumed = (frepo(Latents(width=4, steps=2, slice=2), labels=labels) for _ in range(2))
    checkpointing(tmp_path, 6, every=2).fit(straight, TinyData())
    path = str(tmp_path / "step=2.ckpt")
    checkpointing(tmp_path / "b", 6, every=100).fit(resumed, TinyData(), ckpt_path=path, weights_only=True)
    start = fitted(tmp_path / "c", frepo(labels=labels), steps=0)
    assert not torch.equal(straight.synthetic.parameterisation.features, start.synthetic.parameterisation.features)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_becomes_a_distilled_set_without_data_or_cache(tmp_path, monkeypatch):
    model = frepo()
    checkpointing(tmp_path, 2, every=2).fit(model, TinyData())
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "empty"))
    distilled = distilled_from_checkpoint(tmp_path / "step=2.ckpt")
    assert torch.equal(distilled.images, model.distilled_set().images)
    assert distilled.config["parameterisation"] == TINY.recipe()
    assert float(distilled.pixels().min()) >= 0


def test_outer_steps_change_latents_and_leave_the_generator(tmp_path):
    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            self.state = {name: value.clone() for name, value in pl_module.synthetic.state_dict().items()}

    start = Start()
    metadd = MetaDD(["convnet:width=4,depth=2", "conv:width=4,depth=2"], every=1, training=ClassifierRecipe(steps=30))
    model = frepo(labels="learned")
    fitted(tmp_path, model, TinyData(val_fraction=0.25), callbacks=[PoolAlternation(), metadd, start])
    for name, value in model.synthetic.state_dict().items():
        assert torch.equal(value, start.state[name]) == name.startswith("parameterisation.generator."), name


def test_mixed_precision_runs(tmp_path):
    model = fitted(tmp_path, frepo(), precision="bf16-mixed")
    assert torch.isfinite(model.distilled_set().images).all()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_hold_one_set(tmp_path):
    class KeepRank(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(pl_module.synthetic.state_dict(), tmp_path / f"rank{trainer.global_rank}.pt")

    model = frepo(Latents(width=4, steps=2, seed=9, slice=2), labels="learned")
    trainer = tiny_trainer(tmp_path, 3, callbacks=[PoolAlternation(), KeepRank()], devices=2, strategy="ddp_fork")
    trainer.fit(model, TinyData())
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = fitted(tmp_path / "start", frepo(Latents(width=4, steps=2, seed=9)), steps=0)
    assert not torch.equal(one["parameterisation.features"], start.synthetic.parameterisation.features)


# ---- a generator of one's own ------------------------------------------------------------------------------------


class Mine(nn.Module):
    """From 5 latents and the class to 8 x 8 pixels."""

    def __init__(self, side=8, scale=1.0, noise=0.0, seed=0):
        super().__init__()
        self.side, self.scale, self.noise = side, scale, noise
        self.body = nn.Linear(5 + 3, side * side, bias=False)
        self.body.weight.data.normal_(generator=generator(seed))

    def forward(self, z, classes):
        given = torch.cat([z, torch.nn.functional.one_hot(classes, 3).to(z.dtype)], 1)
        pixels = self.scale * torch.sigmoid(self.body(given)).view(-1, 1, self.side, self.side)
        return pixels + self.noise * torch.rand_like(pixels) if self.noise else pixels


def own(settings="", **options):
    return Latents(generator=f"test_latents.Mine{settings}", **({"latent_size": 5} | options))


def test_a_generator_of_ones_own_is_used_and_its_z_learned(tmp_path):
    model = frepo(own(slice=2), labels="centred")
    data = TinyData()
    fitted(tmp_path, model, data, steps=4)
    assert [name for name, _ in model.synthetic.named_parameters()] == ["parameterisation.z"]
    made = model.synthetic.parameterisation
    plain = data.preprocessing(made.generator(made.z, model.synthetic.classes))
    torch.testing.assert_close(made.render(), plain)
    start = fitted(tmp_path, frepo(own(), labels="centred"), steps=0)
    assert not torch.equal(start.synthetic.parameterisation.z, made.z)
    assert torch.equal(
        start.synthetic.parameterisation.z, torch.randn(3, 5, generator=pretrained.make_generator(0, "init"))
    )
    weights = torch.randn(plain.shape, generator=generator())
    model.synthetic.zero_grad()
    (made.render() * weights).sum().backward()
    expected = torch.autograd.grad((plain * weights).sum(), made.z)[0]
    torch.testing.assert_close(made.z.grad, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (":side=4", r"must give images of shape \(2, 1, 8, 8\) for this data, got \(2, 1, 4, 4\)"),
        (":scale=3.0", r"must give pixels in \[0, 1\], got \["),
        (":scale=.nan", "gives NaN or infinite values"),
        (":noise=0.01,scale=0.9", "other images for the same latents: switch its noise off"),
        (":depth=3", "cannot be made: .*unexpected keyword argument 'depth'"),
    ],
)
def test_a_generator_that_makes_something_else_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        fitted(tmp_path, frepo(own(settings)))
    assert "\n" not in str(caught.value)


def test_a_generator_of_other_latents_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot run on latents of shape \(2, 6\).*latent_size") as caught:
        fitted(tmp_path, frepo(own(latent_size=6)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mine.pt",
            "must be the path of a class of your own, .*: files that hold programs are not run",
        ),
        ("./mine.safetensors", "must be the path of a class of your own"),
        ("mine", "must be the path of a class of your own"),
        ("no_such_package.Mine", "generator 'no_such_package.Mine' cannot be imported"),
        ("test_latents.own", "is no subclass of torch.nn.modules.module.Module"),
    ],
)
def test_a_file_is_no_generator_and_does_not_run(tmp_path, name, message):
    with pytest.raises(UserError, match=message) as caught:
        fitted(tmp_path, frepo(Latents(generator=name)))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_makes_no_generator_but_a_resumed_run_makes_its_own_again(tmp_path):
    checkpointing(tmp_path, 2, every=2).fit(frepo(own()), TinyData())
    checkpoint = str(tmp_path / "step=2.ckpt")
    with pytest.raises(UserError, match=r"test_latents\.Mine. is a program, and none is run for a file"):
        distilled_from_checkpoint(checkpoint)
    checkpointing(tmp_path / "b", 3, every=3).fit(frepo(own()), TinyData(), ckpt_path=checkpoint)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["synthetic.parameterisation.generator.digest"] += 1
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match="has other weights than the checkpoint was made with"):
        checkpointing(tmp_path / "c", 3, every=3).fit(frepo(own()), TinyData(), ckpt_path=checkpoint)

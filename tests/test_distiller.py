"""FRePo and the base distiller: gradients, constants, the loop, the checkpoint, bad input."""

from pathlib import Path

import pytest
import torch
from helpers import LinearNetwork, TinyData, tiny_settings, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from timm.optim import Lamb

from lightning_dd.api import distil
from lightning_dd.callbacks import ExportDistilledSet, PoolAlternation, SyntheticImages
from lightning_dd.data import Batch, RawSplit
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import DC, DM, DSA, MTT, RDED, FRePo, Random, SRe2L, TeacherDistiller, base
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.checkpoint import distilled_from_checkpoint
from lightning_dd.models import build_network
from lightning_dd.models.interface import features_in_slices
from lightning_dd.models.pool import rest
from lightning_dd.pretrained import Teacher
from lightning_dd.students.recipe import PROTOCOLS, protocol, warmup_cosine
from lightning_dd.utils.errors import UserError

TINY = {
    "architecture": "conv:width=4,depth=2",
    "real_batch_size": 8,
    "pool_size": 3,
    "lifetime": 4,
    "probe": Probe(steps=5),
}


def frepo(**changes):
    return FRePo(**(TINY | changes))


def fitted(tmp_path, steps=4, trainer=None, **changes):
    model = frepo(**changes)
    (trainer or tiny_trainer(tmp_path, steps)).fit(model, TinyData())
    return model


# ---- the objective -----------------------------------------------------------------------------------------------


def test_outer_gradient_equals_finite_differences_and_reaches_only_images_and_labels():
    torch.manual_seed(0)
    network = LinearNetwork().double()
    rest(network)
    model = frepo(flip=True)
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    real = Batch(torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 3)

    def total(x, y):
        return sum(model.outer_loss(network, x, y, real).values())

    total(images, labels).backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    generator = torch.Generator().manual_seed(1)
    for tensor, other in ((images, labels), (labels, images)):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        step = 1e-3
        ends = []
        for sign in (1, -1):
            moved = tensor.detach() + sign * step * direction
            pair = (moved, other.detach()) if tensor is images else (other.detach(), moved)
            ends.append(total(*pair))
        numeric = float((ends[0] - ends[1]) / (2 * step))
        assert numeric == pytest.approx(float((tensor.grad * direction).sum()), rel=2e-3)


def test_the_flip_trick_is_the_kernel_of_images_and_their_mirrors():
    torch.manual_seed(0)
    network = LinearNetwork()
    rest(network)
    images, labels = torch.randn(3, 1, 8, 8), torch.randn(3, 3)
    real = Batch(torch.randn(6, 1, 8, 8), torch.arange(6) % 3)
    flipped = frepo(flip=True).outer_loss(network, images, labels, real)["krr"]
    by_hand = frepo(flip=False).outer_loss(
        network, torch.cat([images, images.flip(-1)]), torch.cat([labels, labels]), real
    )["krr"]
    torch.testing.assert_close(flipped, by_hand)


def test_fixed_labels_have_no_margin_term_and_get_no_gradient(tmp_path):
    model = fitted(tmp_path, labels="centred")
    assert [name for name, _ in model.named_parameters()] == ["synthetic.parameterisation.images"]
    start = frepo(labels="centred")
    tiny_trainer(tmp_path, 0).fit(start, TinyData())
    assert torch.equal(model.synthetic.labels, start.synthetic.labels)


def test_features_come_from_inference_mode_and_slices_do_not_change_them():
    network = build_network("conv:width=8", 3, (1, 28, 28), seed=0)
    rest(network)
    images = torch.randn(700, 1, 28, 28)
    whole = network.features(images)
    sliced = features_in_slices(network, images)
    assert not sliced.requires_grad
    torch.testing.assert_close(whole, sliced, rtol=1e-4, atol=1e-5)
    before = {name: value.clone() for name, value in network.named_buffers()}
    model = frepo(flip=False)
    real = Batch(images, torch.arange(700) % 3)
    model.outer_loss(network, images[:3].requires_grad_(), torch.eye(3), real)["krr"].backward()
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


# ---- the loop ----------------------------------------------------------------------------------------------------


def test_lamb_moves_each_tensor_by_lr_of_its_norm_and_decays_to_a_tenth(tmp_path):
    trainer = tiny_trainer(tmp_path, 1)
    model = frepo(lr=0.01)

    class Keep(Callback):
        def on_train_start(self, trainer, pl_module):
            self.start = pl_module.synthetic.images.detach().clone()

    keep = Keep()
    trainer.callbacks.append(keep)
    trainer.fit(model, TinyData())
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, Lamb)
    # The first Adam direction is g/(|g|+eps): every entry about 1, so |update| = lr * |x| * direction/|direction|.
    moved = (model.synthetic.images.detach() - keep.start).norm() / keep.start.norm()
    assert float(moved) == pytest.approx(0.01, rel=1e-3)
    assert warmup_cosine(10, 10, final=0.1) == pytest.approx(0.1)
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0.001)
    assert len(optimizer.param_groups[0]["params"]) == 2  # images and labels: one trust ratio each
    settings = {name: optimizer.param_groups[0][name] for name in ("weight_decay", "max_grad_norm")}
    assert settings == {"weight_decay": 0.0, "max_grad_norm": None}


def test_outer_and_inner_steps_alternate_and_only_outer_ones_count(tmp_path):
    calls = []

    class Watched(FRePo):
        def outer_loss(self, network, images, labels, real):
            calls.append(("outer", network))
            return super().outer_loss(network, images, labels, real)

        def inner_loss(self, network):
            calls.append(("inner", network))
            return super().inner_loss(network)

    model = Watched(**(TINY | {"lifetime": 1000}))
    trainer = tiny_trainer(tmp_path, 6)
    trainer.fit(model, TinyData())
    assert [name for name, _ in calls] == ["outer", "inner"] * 6
    assert all(calls[i][1] is calls[i + 1][1] for i in range(0, 12, 2))
    assert len({id(network) for _, network in calls}) > 1
    assert trainer.global_step == 6
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == 2


def test_the_clock_can_beat_otherwise(tmp_path):
    class EveryThird(PoolAlternation):
        def inner_steps_at(self, outer_step):
            return 5 if outer_step % 3 == 0 else 0

    model = frepo(pool_size=1, lifetime=1000)
    tiny_trainer(tmp_path, 7, callbacks=[EveryThird()]).fit(model, TinyData())
    assert model.pool.current.age == 10
    with pytest.raises(UserError, match=r"PoolAlternation.inner_steps must be at least 0, got -1"):
        PoolAlternation(inner_steps=-1)


def test_the_clock_comes_by_itself_unless_the_trainer_has_one(tmp_path):
    trainer = tiny_trainer(tmp_path, 2, callbacks=[])
    model = frepo(pool_size=1, lifetime=1000)
    trainer.fit(model, TinyData())
    assert [callback.inner_steps for callback in trainer.callbacks if isinstance(callback, PoolAlternation)] == [None]
    assert model.pool.current.age == 2
    trainer = tiny_trainer(tmp_path, 2, callbacks=[PoolAlternation(inner_steps=3)])
    model = frepo(pool_size=1, lifetime=1000)
    trainer.fit(model, TinyData())
    assert [callback.inner_steps for callback in trainer.callbacks if isinstance(callback, PoolAlternation)] == [3]
    assert model.pool.current.age == 6


def test_accumulated_gradients_make_one_outer_step(tmp_path):
    model = frepo(pool_size=1, lifetime=1000)
    trainer = tiny_trainer(tmp_path, 3, accumulate_grad_batches=2)
    trainer.fit(model, TinyData())
    assert trainer.global_step == 3
    assert model.pool.current.age == 3


def test_one_seed_gives_one_result_and_another_seed_another(tmp_path):
    first, second, third = (fitted(tmp_path, seed=seed).synthetic for seed in (0, 0, 1))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.images, third.images)


def test_a_run_does_not_touch_the_global_generator(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer = tiny_trainer(tmp_path, 3)
    model = frepo()
    trainer.fit(model, TinyData())
    assert torch.equal(torch.rand(3), expected)


def test_distilling_lowers_the_loss_on_networks_it_never_met(tmp_path):
    def unseen_loss(model):
        images, labels = model.synthetic()
        losses = []
        for seed in range(10):
            network = model.build_network(1000 + seed)
            rest(network)
            losses.append(
                float(model.outer_loss(network, images, labels, model.trainer.datamodule.train.everything())["krr"])
            )
        return sum(losses) / len(losses)

    start, end = fitted(tmp_path, 0), fitted(tmp_path, 60, lr=0.03)
    assert unseen_loss(end) < 0.7 * unseen_loss(start)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def checkpointing(tmp_path, steps, every, **kwargs):
    callbacks = [
        PoolAlternation(),
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1),
    ]
    return tiny_trainer(tmp_path, steps, callbacks=callbacks, enable_checkpointing=True, **kwargs)


def test_a_resumed_run_equals_the_run_never_interrupted(tmp_path):
    straight = frepo()
    checkpointing(tmp_path, 12, every=5, val_check_interval=4).fit(straight, TinyData())
    resumed = frepo()
    trainer = checkpointing(tmp_path / "b", 12, every=100, val_check_interval=4)
    trainer.fit(resumed, TinyData(), ckpt_path=str(tmp_path / "step=5.ckpt"), weights_only=True)
    assert trainer.global_step == 12
    assert torch.equal(straight.synthetic.images, resumed.synthetic.images)
    assert torch.equal(straight.synthetic.labels, resumed.synthetic.labels)
    for left, right in zip(straight.pool.members, resumed.pool.members, strict=True):
        assert left.age == right.age
        for name, value in left.network.state_dict().items():
            assert torch.equal(value, right.network.state_dict()[name])


def test_a_checkpoint_loads_from_python_and_becomes_a_distilled_set(tmp_path):
    model = frepo()
    checkpointing(tmp_path, 4, every=4).fit(model, TinyData())
    path = tmp_path / "step=4.ckpt"
    torch.load(path, weights_only=True)
    loaded = FRePo.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(loaded.synthetic.images, model.synthetic.images)
    distilled = distilled_from_checkpoint(path)
    assert torch.equal(distilled.images, model.synthetic.images.detach())
    assert distilled.method == "FRePo"
    assert distilled.training["outer_step"] == 4
    assert DistilledSet.load(distilled.save(tmp_path / "set.safetensors")).config["ipc"] == 1


class OtherPixels(TinyData):
    def read(self, *, train):
        raw = super().read(train=train)
        return RawSplit(255 - raw.images, raw.labels, raw.class_names)


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"ipc": 2}, TinyData, "another configuration: ipc is 1 there and 2 here"),
        ({"lr": 0.5}, TinyData, "another configuration: lr is 0.0003 there and 0.5 here"),
        ({}, OtherPixels, "other data: name is 'TinyData' there and 'OtherPixels' here"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, settings, data, message):
    checkpointing(tmp_path, 2, every=2).fit(frepo(), TinyData())
    with pytest.raises(UserError, match=message):
        tiny_trainer(tmp_path, 4).fit(frepo(**settings), data(), ckpt_path=str(tmp_path / "step=2.ckpt"))


def test_a_checkpoint_from_before_a_setting_existed_is_continued(tmp_path):
    checkpointing(tmp_path, 2, every=2).fit(frepo(), TinyData())
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    del content["hyper_parameters"]["balance"]
    torch.save(content, tmp_path / "older.ckpt")
    trainer = tiny_trainer(tmp_path, 4)
    trainer.fit(frepo(), TinyData(), ckpt_path=str(tmp_path / "older.ckpt"), weights_only=True)
    assert trainer.global_step == 4


def test_a_checkpoint_that_is_none_gives_one_line(tmp_path):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK\x03\x04 nothing")
    for path, message in ((broken, "not a file of torch.save"), (tmp_path / "no.ckpt", "no such file")):
        with pytest.raises(UserError, match=message):
            distilled_from_checkpoint(path)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="not written by a lightning_dd distiller"):
        distilled_from_checkpoint(tmp_path / "foreign.ckpt")


class Boom:
    def __reduce__(self):
        return (open, ("boom.txt", "w"))


def test_a_checkpoint_runs_nothing_and_claims_no_more_than_it_holds(tmp_path):
    path, swollen = tmp_path / "bad.ckpt", torch.zeros(1).expand(10**12)
    cyclic = [1]
    cyclic.append(cyclic)
    for content, message in (
        ({"state_dict": Boom()}, "only tensors and numbers are safe to load"),
        ({"state_dict": {"synthetic.labels": swollen}}, "holds fewer numbers"),
        ({"state_dict": cyclic}, "not written by a lightning_dd distiller"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            distilled_from_checkpoint(path)
        if "distiller" not in message:
            with pytest.raises(UserError, match=message):
                distil(frepo(), TinyData(), output=tmp_path / "run", ckpt_path=str(path))
    with pytest.raises(UserError, match=r"ckpt_path 'http://x/y.ckpt' must be a file of this machine"):
        distil(frepo(), TinyData(), output=tmp_path / "run", ckpt_path="http://x/y.ckpt")
    assert not Path("boom.txt").exists()


@pytest.mark.parametrize(
    ("place", "junk", "message"),
    [
        (("lightning_dd", "facts"), None, "damaged"),
        (("lightning_dd", "facts", "image_shape"), "abc", "damaged"),
        (("lightning_dd", "facts", "image_shape"), [1, 10**6, 10**6], "damaged"),
        (("lightning_dd", "preprocessing"), {}, "preprocessing: expected mean, std"),
        (("lightning_dd", "preprocessing", "std"), torch.zeros(1), "std above 0"),
        (("lightning_dd", "method"), "Nothing", "unknown method 'Nothing'"),
        (("lightning_dd", "method"), 3, "damaged"),
        (("hyper_parameters", "ipc"), 10**9, "ipc is not that of its labels"),
        (("hyper_parameters", "other"), 1, "damaged"),
        (("state_dict",), {}, "damaged"),
        (("state_dict", "synthetic.labels"), torch.zeros(3, 4), "damaged"),
        (("global_step",), "many", "damaged"),
    ],
)
def test_junk_in_a_checkpoint_is_one_line(tmp_path, place, junk, message):
    checkpointing(tmp_path, 2, every=2).fit(frepo(), TinyData())
    content = inside = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = junk
    torch.save(content, tmp_path / "junk.ckpt")
    with pytest.raises(UserError, match=message) as caught:
        distilled_from_checkpoint(tmp_path / "junk.ckpt")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_deletes_nothing_outside_its_run(tmp_path):
    """Lightning removes the checkpoints that a callback's state calls older, and a folder with all that is in it."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("five years")
    checkpointing(run, 2, every=2).fit(frepo(), TinyData())
    content = torch.load(run / "step=2.ckpt", weights_only=True)
    (key,) = (name for name in content["callbacks"] if name.startswith("ModelCheckpoint"))
    path = str(run / ".." / "mine")
    named = {"dirpath": str(run), "best_k_models": {path: torch.tensor(0.0)}, "kth_best_model_path": path}
    content["callbacks"][key] |= named | {"best_model_path": path, "last_model_path": path}
    torch.save(content, tmp_path / "bad.ckpt")
    keep = ModelCheckpoint(run, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    again = ModelCheckpoint(run, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    content["callbacks"][keep.state_key] = content["callbacks"][key]
    torch.save(content, tmp_path / "bad.ckpt")
    trainer = tiny_trainer(run, 5, callbacks=[PoolAlternation(), keep, again], enable_checkpointing=True)
    trainer.fit(frepo(), TinyData(), ckpt_path=str(tmp_path / "bad.ckpt"), weights_only=True)
    assert trainer.global_step == 5
    assert (mine / "thesis.txt").exists()


# ---- scores, files, pictures -------------------------------------------------------------------------------------


def test_files_and_pictures_are_written_at_the_end_and_at_the_best_score(tmp_path):
    callbacks = [PoolAlternation(), ExportDistilledSet(str(tmp_path)), SyntheticImages(dirpath=str(tmp_path))]
    model = fitted(tmp_path, trainer=tiny_trainer(tmp_path, 4, callbacks=callbacks, val_check_interval=2))
    last = DistilledSet.load(tmp_path / "last.safetensors")
    best = DistilledSet.load(tmp_path / "best.safetensors")
    assert torch.equal(last.images, model.synthetic.images.detach())
    assert best.training["val/accuracy"] >= last.training["val/accuracy"]
    assert best.training["outer_step"] in (2, 4)
    assert last.config["student_architecture"] == "conv:width=4,depth=2,norm=none"
    assert last.class_names == ("class0", "class1", "class2")
    for name in ("initial.png", "final.png", "labels.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    callbacks = [PoolAlternation(), ExportDistilledSet(str(blocker / "out"))]
    with pytest.raises(UserError, match="cannot write to folder"):
        tiny_trainer(tmp_path, 4, callbacks=callbacks).fit(frepo(), TinyData())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ipc": 0}, r"ipc \(images per class\) must be at least 1, got 0"),
        ({"init": "zeros"}, "init must be 'real', 'patches' or 'noise', got 'zeros'"),
        ({"labels": "fuzzy"}, "labels of FRePo must be one of"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"real_batch_size": 0}, "real_batch_size must be at least 1"),
        ({"inner_lr": 0.0}, "inner_lr must be positive"),
        ({"inner_batch_size": 0}, "inner_batch_size must be at least 1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        frepo(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ipc": 500}, "largest possible ipc is"),
        ({"architecture": "nonsense"}, "unknown architecture 'nonsense'"),
        ({"architecture": "conv:depth=7"}, "too small for depth 7"),
        ({"pool_size": 0}, "pool_size must be at least 1"),
        ({"lifetime": -1}, "lifetime must be at least 0"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused_before_the_first_step(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        tiny_trainer(tmp_path).fit(frepo(**settings), TinyData())


def test_validate_test_and_predict_work_without_a_fit(tmp_path):
    trainer = tiny_trainer(tmp_path)
    model, data = frepo(probe=Probe(60, 3e-3)), TinyData(val_fraction=0.25)
    assert trainer.validate(model, data, verbose=False)[0]["val/accuracy"] > 0.5
    assert trainer.test(model, data, verbose=False)[0]["test/accuracy"] > 0.5
    batches = trainer.predict(model, data)
    assert sum(len(batch) for batch in batches) == 36
    torch.testing.assert_close(batches[0].sum(1), torch.ones(len(batches[0])))


@pytest.mark.parametrize(
    ("cls", "labels", "name"),
    [
        (FRePo, "learned", "frepo"),
        (DC, "hard", "dc"),
        (DSA, "hard", "dsa"),
        (DM, "hard", "dsa"),
        (MTT, "hard", "mtt"),
        (Random, "hard", "dsa"),
        (Random, "soft", "sre2l"),
        (SRe2L, "soft", "sre2l"),
        (RDED, "soft", "rded"),
    ],
)
def test_the_score_that_chooses_the_best_set_is_trained_by_the_methods_own_protocol(
    cls, labels, name, tmp_path, monkeypatch
):
    recipes = []
    monkeypatch.setattr(base, "train_student", lambda network, distilled, recipe, seed: recipes.append(recipe))
    settings = {"architecture": "convnet:width=4,depth=2", "labels": labels, "probe": Probe()}
    if issubclass(cls, TeacherDistiller):
        settings["teacher"] = Teacher("convnet:width=4,depth=2,norm=batch", steps=40, lr=0.02)
    model = cls(**tiny_settings(cls) | settings | ({"step_size": 0.25} if cls is MTT else {}))
    trainer = tiny_trainer(tmp_path, callbacks=[])
    trainer.validate(model, TinyData(val_fraction=0.25), verbose=False)
    model.probe = Probe(steps=9, lr=0.3)
    trainer.validate(model, TinyData(val_fraction=0.25), verbose=False)
    published = PROTOCOLS[name].suited_to("convnet", 0.25)  # MTT's learned step size
    assert recipes == [published, protocol(name, steps=9, lr=0.3)]
    assert (published.lr == 0.25) == (cls is MTT)


def test_a_probe_names_a_published_protocol():
    assert Probe(protocol="dc_digits").recipe("dc") == PROTOCOLS["dc_digits"]
    with pytest.raises(UserError, match="unknown protocol 'krr'"):
        Probe(protocol="krr")

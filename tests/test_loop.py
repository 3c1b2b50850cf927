"""A student's steps: the same under a Trainer and in the bare loop, and what a protocol's name stands for."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import TinyData, make_distilled, tiny_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_dd.augment.frepo import Augmentation
from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS, MNIST5k
from lightning_dd.distilled import DistilledData
from lightning_dd.distilled.views import draw_views
from lightning_dd.evaluators import matrix
from lightning_dd.evaluators.matrix import ALL_REAL, DISTILLED, Cell, Hardware, run_cell
from lightning_dd.models import build_network, interface
from lightning_dd.models.interface import logits_in_slices
from lightning_dd.students import Student
from lightning_dd.students.loop import StudentStep, train_student
from lightning_dd.students.recipe import PROTOCOLS, Recipe
from lightning_dd.utils.errors import UserError

SMALL = "conv:width=4,depth=2,norm=none"
DROPS = "vit_tiny_patch16_224:patch_size=4,depth=1,embed_dim=8,num_heads=2,proj_drop_rate=0.5"
PLAIN = Recipe(steps=7, batch_size=4, lr=0.01)
AVERAGED = Recipe(steps=7, batch_size=4, lr=0.01, augment="siamese", optimizer="sgd", momentum=0.9, ema=0.9)


def set_of(kind):
    if kind != "soft":
        return make_distilled(ipc=2, label_kind=kind)
    views = draw_views(3, (1, 8, 8), 6, 3, torch.Generator().manual_seed(0))
    views.logits.copy_(torch.randn(views.logits.shape, generator=torch.Generator().manual_seed(1)))
    hard = make_distilled(ipc=2, label_kind="hard")
    return replace(hard, labels=4 * hard.labels, label_kind="soft", temperature=4.0, views=views)


def new_student(architecture, distilled, recipe, seed):
    """Build and train a network as a Student of this architecture, recipe and seed is."""
    network = build_network(architecture, distilled.num_classes, distilled.image_shape, seed)
    return train_student(network, distilled, recipe.suited_to(architecture, distilled.training.get("step_size")), seed)


def under_a_trainer(architecture, distilled, recipe, seed):
    student = Student.with_recipe(architecture, recipe, seed)
    data = DistilledData.from_set(distilled, TinyData())
    tiny_trainer(".", -1, callbacks=[], limit_val_batches=0).fit(student, data)
    return student.network


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("recipe", [PLAIN, AVERAGED], ids=["plain", "averaged"])
@pytest.mark.parametrize("architecture", [SMALL, "convnet:width=4,depth=2,norm=batch", DROPS])
@pytest.mark.parametrize("kind", ["hard", "learned", "soft"])
def test_the_bare_loop_takes_the_steps_of_a_student_under_a_trainer(kind, architecture, recipe):
    distilled = set_of(kind)
    with_trainer = under_a_trainer(architecture, distilled, recipe, seed=3)
    bare = new_student(architecture, distilled, recipe, seed=3)
    assert_same(bare.state_dict(), with_trainer.state_dict())
    drops = [layer for layer in bare.modules() if isinstance(layer, nn.Dropout) and layer.p > 0]
    assert bool(drops) == (architecture == DROPS)
    assert not torch.equal(
        next(bare.parameters()), next(new_student(architecture, distilled, recipe, seed=4).parameters())
    )


def test_a_learned_learning_rate_and_that_of_an_architecture_reach_both(tmp_path):
    for changes in ({"learned_lr": True}, {"lr_of": (("conv", 0.3),)}):
        distilled = replace(set_of("hard"), training={"step_size": 0.2})
        recipe = replace(PLAIN, optimizer="sgd", warmup=0, **changes)
        bare = new_student(SMALL, distilled, recipe, seed=0)
        assert_same(bare.state_dict(), under_a_trainer(SMALL, distilled, recipe, seed=0).state_dict())
        assert not torch.equal(next(bare.parameters()), next(new_student(SMALL, distilled, PLAIN, seed=0).parameters()))


@pytest.mark.parametrize("recipe", [PLAIN, AVERAGED], ids=["plain", "averaged"])
def test_a_stop_gives_what_a_shorter_training_would(recipe):
    distilled, seen = set_of("hard"), {}
    recipe = replace(recipe, schedule="constant", warmup=0)

    def keep(network, taken):
        assert not network.training
        seen[taken] = {name: value.clone() for name, value in network.state_dict().items()}

    long = train_student(build_network(SMALL, 3, (1, 8, 8), seed=0), distilled, recipe, 0, (3, 7), keep)
    short = new_student(SMALL, distilled, replace(recipe, steps=3), seed=0)
    assert_same(seen[3], short.state_dict())
    assert_same(seen[7], long.state_dict())
    assert_same(long.state_dict(), new_student(SMALL, distilled, recipe, seed=0).state_dict())


def test_every_step_augments_anew_and_a_step_always_in_the_same_way():
    one_step = StudentStep.on(make_distilled(label_kind="hard"), Recipe(augment="siamese"), seed=0, mirror=True)
    images, seen = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), []

    def network(shown):
        seen.append(shown)
        return shown.flatten(1)[:, :3]

    for step in (0, 1, 2, 1):
        one_step.loss(network, images, torch.eye(3).repeat(2, 1), step)
    assert torch.equal(seen[1], seen[3])
    assert not any(torch.equal(seen[1], other) for other in (seen[0], seen[2]))


def test_every_student_is_kept_channels_last(tmp_path):
    distilled, seen = set_of("hard"), []

    def look(network):
        seen.extend(layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d))

    network = build_network("conv:width=4,depth=2", 3, (1, 8, 8), seed=0)
    look(train_student(network, distilled, AVERAGED, 0, (2,), lambda network, taken: look(network)))
    look(under_a_trainer("conv:width=4,depth=2", distilled, PLAIN, 0))
    assert len(seen) == 3 * 2
    wide = [weight for weight in seen if weight.shape[1] > 1]  # one channel is the same in either order
    assert wide
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide)


@pytest.mark.parametrize("mirror", [True, False])
def test_whether_images_are_mirrored_is_a_fact_of_the_set(mirror):
    distilled = replace(make_distilled(ipc=2), data={"name": "x", "spec": {}, "mirror": mirror})
    for augment, named in (("auto", Augmentation("auto", mirror).strategy), ("siamese", None)):
        network = new_student(SMALL, distilled, replace(PLAIN, augment=augment), seed=0)
        if named is not None:
            other = new_student(SMALL, distilled, replace(PLAIN, augment=named), seed=0)
            assert_same(network.state_dict(), other.state_dict())
        opposite = replace(distilled, data={**distilled.data, "mirror": not mirror})
        other = new_student(SMALL, opposite, replace(PLAIN, augment=augment), seed=0)
        assert not torch.equal(network.head.weight, other.head.weight)


# ---- a protocol means one thing ----------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch):
    """The state of every student when its training has ended."""
    states = []

    def keep(student, steps):
        states.append((steps, {name: value.clone() for name, value in student.network.state_dict().items()}))

    def fit(trainer, student, *args):
        bare(trainer, student, *args)
        keep(student, trainer.max_steps)

    bare = matrix._fit
    monkeypatch.setattr(Student, "on_fit_end", lambda self: keep(self, self.trainer.global_step))
    monkeypatch.setattr(matrix, "_fit", fit)
    return states


@pytest.mark.parametrize("source", [DISTILLED, ALL_REAL])
@pytest.mark.parametrize("recipe", [PLAIN, replace(AVERAGED, steps=None, epochs=13)], ids=["plain", "averaged"])
def test_a_row_and_its_curves_are_those_of_a_trainer_without_its_work(recipe, source, tmp_path, monkeypatch):
    distilled, cell, seen = make_distilled(ipc=2), Cell("set", SMALL, source, 1), []
    for fit in (matrix._fit, lambda trainer, student, data, *_: trainer.fit(student, datamodule=data)):
        real, folder, ticks = TinyData(val_fraction=0.25), tmp_path / str(len(seen)), []
        real.setup("test")
        monkeypatch.setattr(matrix, "_fit", fit)
        row = run_cell(cell, distilled, real, recipe, Hardware("cpu"), folder, partial(ticks.append, None))
        curves = EventAccumulator(str(next(folder.rglob("events*")).parent)).Reload()
        names = ("student/loss", "val/accuracy", "test/accuracy")
        seen.append((row, len(ticks), [[(kept.step, kept.value) for kept in curves.Scalars(name)] for name in names]))
    assert seen[0] == seen[1]
    assert len(seen[0][2][0]) == seen[0][1] == seen[0][0].steps


@pytest.mark.parametrize("name", ["dsa", "glad", "frepo"])
def test_fit_and_evaluate_follow_a_protocol_alike(name, kept, tmp_path, monkeypatch):
    short = {"epochs": 3, "batch_size": 4} if name != "frepo" else {"steps": 6, "batch_size": 4}
    monkeypatch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], **short))
    distilled = make_distilled(ipc=1, data=MNIST5k, label_kind="hard")
    file = str(distilled.save(tmp_path / "set.safetensors"))
    architecture = "convnet:width=4,depth=2"
    arguments = [
        *("fit", "--seed_everything=5", "--data=DistilledData", f"--data.file={file}", "--model=Student"),
        *(f"--model.init_args.protocol={name}", f"--model.init_args.architecture={architecture}"),
        *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"),
    ]
    assert main(arguments) == 0
    real = MNIST5k()
    real.setup("test")
    cell = Cell("set", architecture, "distilled", 5, name)
    run_cell(cell, distilled, real, PROTOCOLS[name], Hardware("cpu"), tmp_path / "logs", lambda: None)
    (steps, fitted), (others, evaluated) = kept
    assert steps == others == (6 if name == "frepo" else 9)
    assert_same(fitted, evaluated)


def test_what_the_trainer_and_the_data_say_wins_over_the_protocol(kept, tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)
    distilled = make_distilled(ipc=2, label_kind="hard")
    student, data = Student(SMALL, "dsa", seed=2), DistilledData.from_set(distilled, TinyData(), batch_size=3, seed=1)
    tiny_trainer(tmp_path, 5, callbacks=[]).fit(student, data)
    ((steps, state),) = kept
    assert steps == 5
    expected = Student(SMALL, "dsa", seed=2)
    expected.recipe = replace(expected.recipe, batch_size=3, steps=5)
    tiny_trainer(tmp_path, -1, callbacks=[]).fit(expected, DistilledData.from_set(distilled, TinyData(), seed=1))
    assert_same(state, kept[1][1])
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        DistilledData.from_set(distilled, TinyData(), batch_size=0)


def test_a_loss_is_handed_to_the_logger_at_logging_steps_alone(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(
        Student, "log", lambda self, name, *_, **__: logged.append((name, self.trainer.global_step + 1))
    )
    trainer = tiny_trainer(tmp_path, 5, callbacks=[], log_every_n_steps=2, limit_val_batches=0)
    trainer.fit(Student(SMALL), DistilledData.from_set(set_of("hard"), TinyData()))
    assert logged == [("student/loss", 2), ("student/loss", 4)]


def test_a_network_is_scored_in_slices_with_the_same_answers(monkeypatch):
    network, sizes = build_network("conv:width=4,depth=2", 3, (1, 8, 8), seed=0).eval(), []
    network.register_forward_hook(lambda network, images, logits: sizes.append(len(logits)))
    images = torch.randn(40, 1, 8, 8)
    whole = logits_in_slices(network, images)
    monkeypatch.setattr(interface, "_CPU_BYTES", 4 * 8 * 8 * 4 * 18)
    assert torch.allclose(logits_in_slices(network, images), whole, atol=1e-6)
    assert sizes == [40, 18, 18, 4]

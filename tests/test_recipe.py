"""Recipes and the published ones: their numbers, and that they steer the student."""

import pytest
import torch
from helpers import TinyData, make_distilled, tiny_trainer
from pytorch_lightning import Callback

from lightning_dd.data import DATA_SETS
from lightning_dd.distilled import DistilledData
from lightning_dd.evaluators.evaluate import evaluate_files
from lightning_dd.losses.labels import student_loss
from lightning_dd.students import Student
from lightning_dd.students.recipe import PROTOCOLS, SCHEDULES, Recipe, protocol
from lightning_dd.utils.errors import UserError

SMALL = "conv:width=4,depth=2,norm=none"


@pytest.mark.parametrize(
    ("name", "rows", "steps", "kind", "first", "last"),
    [
        ("frepo", 100, 2000, torch.optim.Adam, 0.0, 3e-6),
        ("dc", 500, 602, torch.optim.SGD, 0.01, 0.001),
        ("dc_digits", 10, 1001, torch.optim.SGD, 0.01, 0.001),
        ("dsa", 10, 1001, torch.optim.SGD, 0.01, 0.001),
        ("mtt", 300, 2002, torch.optim.SGD, 0.01, 0.001),
        ("glad", 10, 1000, torch.optim.SGD, 0.0, 0.0),
        ("sre2l", 2000, 600, torch.optim.AdamW, 1e-3, 0.0),
        ("sre2l_cifar", 5000, 16000, torch.optim.AdamW, 1e-3, 0.0),
        ("sre2l_tiny", 10000, 4000, torch.optim.SGD, 0.0, 0.0),
        ("rded", 100, 600, torch.optim.AdamW, 1e-3, 0.5e-3),
        ("rd3", 100, 800, torch.optim.Adam, 1e-3, 0.0),
    ],
)
def test_published_lengths_optimizers_and_learning_rates(name, rows, steps, kind, first, last):
    recipe = protocol(name)
    assert recipe.steps_for(rows, 10) == steps
    network = torch.nn.Linear(2, 2)
    optimizer = recipe.build_optimizer(network)
    assert type(optimizer) is kind
    schedule = recipe.scheduler(optimizer, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(first)
    assert rates[-1] == pytest.approx(last, abs=1e-8)
    if recipe.epochs is not None:  # the rate is an epoch's
        each = steps // recipe.epochs
        assert rates[:steps:each] == rates[each - 1 : steps : each]
    assert max(rates) == pytest.approx(recipe.lr, rel=1e-3)


@pytest.mark.parametrize(
    ("ipc", "classes", "batch", "steps"),
    [
        (1, 10, 10, 300),
        (10, 10, 50, 600),
        (50, 10, 100, 1500),
        (1, 100, 20, 1500),
        (50, 100, 200, 7500),
        (1, 200, 100, 600),
        (50, 200, 100, 30000),
        (50, 1000, 200, 75000),
        (1, 2, 2, 300),
    ],
)
def test_rdeds_batches_follow_ipc_and_classes(ipc, classes, batch, steps):
    """As argument.py of the official code; the largest set of few classes is one batch."""
    recipe = protocol("rded")
    assert recipe.batch_for(ipc * classes, classes) == batch
    assert recipe.steps_for(ipc * classes, classes) == steps
    assert protocol("rded", batch_size=7).batch_for(ipc * classes, classes) == 7


def test_the_squared_temperature_is_a_setting_of_the_recipe():
    logits, labels = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    plain = student_loss(logits, labels, "soft", 20.0)
    torch.testing.assert_close(student_loss(logits, labels, "soft", 20.0, temperature_squared=True), 400 * plain)
    assert [name for name, recipe in PROTOCOLS.items() if recipe.temperature_squared] == ["sre2l_tiny"]


def test_a_learning_rate_of_an_architecture_is_found_whatever_its_library():
    recipe = protocol("rded")
    assert recipe.suited_to("torchvision/mobilenet_v2").lr == recipe.suited_to("mobilenetv2_100").lr == 2.5e-3


def test_schedules_at_their_middle():
    at_half = {name: schedule(51, 102, 0, 0.0) for name, schedule in SCHEDULES.items()}
    assert at_half == pytest.approx({"cosine": 0.5, "half_cosine": 0.8535534, "step": 1.0, "constant": 1.0})
    # DC, DSA and MTT say 300 or 1,000 epochs, run one more, and drop the rate when epoch E // 2 + 1 is over.
    for name, said in (("dc", 300), ("dsa", 1000), ("mtt", 1000), ("dc_digits", 1000)):
        epochs = protocol(name).epochs
        factors = [SCHEDULES["step"](epoch, epochs, 0, 0.0) for epoch in range(epochs)]
        assert factors == [1.0] * (said // 2 + 2) + [0.1] * (said // 2 - 1)
    # GLaD warms up for the first half and decays in the second.
    recipe = PROTOCOLS["glad"]
    factors = [SCHEDULES["cosine"](step, 100, recipe.warmup, recipe.final_lr) for step in (25, 50, 75)]
    assert factors == pytest.approx([0.5, 1.0, 0.5])


def test_rates_by_architecture_and_learned_with_the_set():
    assert protocol("rded").suited_to("vit_tiny_patch16_224").lr == 1e-4
    assert protocol("rded").suited_to("resnet18").lr == 1e-3
    assert protocol("mtt").suited_to("convnet", learned_lr=0.02).lr == 0.02
    assert protocol("mtt").suited_to("convnet").lr == 0.01
    assert protocol("dsa").suited_to("convnet", learned_lr=0.02).lr == 0.01
    for name in ("mtt", "rded"):  # what is given counts
        assert protocol(name, lr=0.3).suited_to("vgg11", learned_lr=0.02).lr == 0.3


@pytest.mark.parametrize(("name", "spared"), [("rded", True), ("sre2l", True), ("dsa", False)])
def test_weight_decay_spares_what_is_no_matrix_where_the_published_code_does(name, spared):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    network.register_parameter("position", torch.nn.Parameter(torch.ones(1, 2, 3)))
    optimizer = protocol(name).build_optimizer(network)
    decay = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    found = {name: decay[id(value)] > 0 for name, value in network.named_parameters()}
    assert found == {"position": not spared, "0.weight": True} | dict.fromkeys(
        ("0.bias", "1.weight", "1.bias"), not spared
    )


class Rate(Callback):
    def on_train_start(self, trainer, *args):
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]


def test_a_student_follows_the_protocol_the_set_and_what_is_given(tmp_path):
    distilled = make_distilled(training={"step_size": 0.03}, label_kind="hard")
    rates = []
    for student in (Student(SMALL, "mtt"), Student(SMALL, "dsa"), Student(SMALL, "dsa", lr=0.5)):
        rate = Rate()
        tiny_trainer(tmp_path, 4, callbacks=[rate]).fit(student, DistilledData.from_set(distilled, TinyData()))
        rates.append(rate.rate)
        assert len(student.one_step.augmentation.operations) == 6
    assert rates == [0.03, 0.01, 0.5]


def test_protocols_make_a_matrix(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)
    files = [
        str(make_distilled(label_kind=kind).save(tmp_path / f"{kind}.safetensors")) for kind in ("hard", "centred")
    ]
    recipes = {"frepo": Recipe(steps=2), "dsa": Recipe(steps=3, optimizer="sgd", lr=0.1)}
    rows = evaluate_files(files, [SMALL], str(tmp_path / "r"), 2, recipes)
    assert {(row.set, row.protocol, row.steps) for row in rows} == {
        (kind, name, steps) for kind in ("hard", "centred") for name, steps in (("frepo", 2), ("dsa", 3))
    }
    table = (tmp_path / "r" / "results.md").read_text()
    for label in ("hard (frepo)", "hard (dsa)", "centred (frepo)", "centred (dsa)"):
        assert f"| {label} |" in table
    assert "Paired difference to `hard (dsa)`" in table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "unknown recipe.optimizer 'lion'"),
        ({"schedule": "linear"}, "unknown recipe.schedule 'linear'"),
        ({"momentum": 1.0}, r"recipe.momentum must be in \[0, 1\)"),
        ({"weight_decay": -1}, "recipe.weight_decay must be at least 0"),
        ({"epochs": 0}, "recipe.epochs must be at least 1"),
    ],
)
def test_bad_recipes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Recipe(**settings)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match="unknown protocol 'krr'"):
        protocol("krr")

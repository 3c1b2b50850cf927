"""One student of an evaluation: what it is trained on, how it is trained and tested, and its row."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn

from lightning_dd.data import RealData
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distilled.datamodule import DistilledData, real_set
from lightning_dd.distilled.multiformation import MultiFormed
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.evaluators.probe import linear_probe
from lightning_dd.losses.krr import initial_labels
from lightning_dd.models.factory import ArchitectureSpec, NetworkMixture
from lightning_dd.models.interface import logits_in_slices
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.students.student import Student
from lightning_dd.utils.board import Board
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator
from lightning_dd.utils.trainer import make_trainer

DISTILLED, RANDOM_REAL = "distilled", "random-real"
HARD_LABELS, SAME_LABELS, WITHOUT_VIEWS, ALL_REAL = "hard-labels", "random-same-labels", "without-views", "all-real"


@dataclass(frozen=True)
class Cell:
    """One student to train."""

    set_name: str
    architecture: str
    source: str
    """What is trained on: a name of :data:`SOURCES`."""
    seed: int
    protocol: str = ""
    """Name of the recipe."""


@dataclass(frozen=True)
class Row:
    """One trained student; accuracies in [0, 1]."""

    set: str
    architecture: str
    seen: bool
    """Whether the set was distilled with an architecture of this name, whatever its options."""
    source: str
    seed: int
    accuracy: float
    """Test accuracy after the last step."""
    accuracy_best: float | None
    """Test accuracy at the step with the best validation accuracy; none without a validation split."""
    best_step: int | None
    steps: int
    ipc: int
    """Images per class that are stored."""
    method: str
    group: str = ""
    """Sets that differ in the seed of their distillation alone share a group; empty stands for the set's own."""
    distillation_seed: int | None = None
    protocol: str = ""
    seconds: float = 0.0
    """Wall time of training and testing this student."""
    by_class: tuple[float, ...] = ()
    """Test accuracy of each class after the last step, in label order; in its own file of a report."""
    other_data: bool = False
    """Whether the real data here is not what the set was made from."""
    shown_ipc: int | None = None
    """Images per class that a set shows, where they are more than it stores."""
    label_bytes: int = 0
    """Of the labels of a distilled set, with a teacher's views of them."""


@dataclass(frozen=True)
class Hardware:
    """Where students are trained: Lightning's Trainer arguments."""

    accelerator: str = "auto"
    devices: int | list[int] = 1
    strategy: str = "auto"


def is_seen(architecture: str, distilled: DistilledSet) -> bool:
    """Tell whether a set was distilled with an architecture of this name, whatever the options of either."""
    own = () if distilled.architecture is None else NetworkMixture.parse(distilled.architecture).names
    return ArchitectureSpec.parse(architecture).name in {ArchitectureSpec.parse(name).name for name in own}


def run_cell(
    cell: Cell,
    distilled: DistilledSet,
    real: RealData,
    recipe: Recipe,
    hardware: Hardware,
    log_dir: Path,
    on_step: Callable[[], object],
    probe: str | None = None,
) -> Row:
    """Train a cell's student on the set it names (or on what stands in for it), and test it on set-up real data.

    With a ``probe`` the student is a linear layer on a network of those weights.
    """
    source = SOURCES[cell.source](distilled, real, cell.seed)
    data = DistilledData.from_set(source, real)
    body = (
        None if probe is None else linear_probe(cell.architecture, probe, real.facts, source.preprocessing, cell.seed)
    )
    student = Student.with_recipe(cell.architecture, recipe, cell.seed, body)
    steps = recipe.steps_for(len(distilled), distilled.num_classes)
    best = BestWeights()
    trainer = _trainer(cell, steps, hardware, log_dir, [LambdaCallback(on_train_batch_end=lambda *_: on_step()), best])
    logger = trainer.loggers[0]
    if trainer.world_size == 1:
        _fit(trainer, student, data, best, on_step)
    else:
        trainer.fit(student, datamodule=data)
    trainer.logger = None  # tests would each open another event file
    last = _test(trainer, student, data)
    by_class = tuple(round(value, 5) for value in student.class_accuracy.tolist())
    at_best = None if best.weights is None else last
    if best.weights is not None and best.step != steps:
        student.network.load_state_dict(best.weights)
        at_best = _test(trainer, student, data)
    logger.log_metrics({"test/accuracy": last}, steps)
    logger.finalize("success")
    return Row(
        set=cell.set_name,
        architecture=cell.architecture,
        seen=is_seen(cell.architecture, distilled),
        source=cell.source,
        seed=cell.seed,
        accuracy=last,
        accuracy_best=at_best,
        best_step=best.step,
        steps=steps,
        ipc=distilled.ipc,
        method=source.method,
        protocol=cell.protocol,
        by_class=by_class,
        shown_ipc=None if distilled.stored is None else distilled.shown_ipc,
    )


def _trainer(cell: Cell, steps: int, hardware: Hardware, log_dir: Path, callbacks: list[Callback]) -> Trainer:
    """Return a quiet Trainer that validates five times."""
    parts = [cell.architecture, cell.source, str(cell.seed), *([cell.protocol] if cell.protocol else [])]
    version = re.sub(r"[^\w.=-]+", "-", "-".join(parts))
    return make_trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        strategy=hardware.strategy,
        max_steps=steps,
        check_val_every_n_epoch=None,
        val_check_interval=max(1, steps // 5),
        log_every_n_steps=max(1, steps // 50),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=Board(log_dir, name=cell.set_name, version=version, default_hp_metric=False),
        callbacks=callbacks,
    )


def _fit(
    trainer: Trainer, student: Student, data: DistilledData, best: "BestWeights", on_step: Callable[[], object]
) -> None:
    """Do what ``trainer.fit`` does on one device, to the digit, without its own work: a fifth of a small step.

    The Trainer says which device, how many steps, and how often a student is logged and validated.
    """
    trainer.datamodule, student.trainer, data.trainer = data, trainer, trainer  # type: ignore[attr-defined]
    data.setup("fit")
    student.configure_model()
    student.setup("fit")
    student.to(trainer.strategy.root_device)
    logger, validation, steps = trainer.loggers[0], data.val_dataloader(), trainer.max_steps
    logger.log_hyperparams({**student.hparams, **asdict(student.recipe)})
    log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    validate_every = int(trainer.val_check_interval)

    def after(loss: Tensor, step: int) -> None:
        if step % log_every == 0:
            logger.log_metrics({"student/loss": float(loss)}, step - 1)
        on_step()

    @torch.no_grad()
    def validate(network: nn.Module, step: int) -> None:
        for images, labels in validation:
            student.accuracy.update(logits_in_slices(network, images.to(student.device)), labels.to(student.device))
        score = float(student.accuracy.compute())
        student.accuracy.reset()
        best.see(network)
        best.keep(score, step)
        logger.log_metrics({"val/accuracy": score}, step - 1)

    stops = range(validate_every, steps + 1, validate_every) if data.real.val is not None else ()
    what = student.network, data.distilled, student.recipe, student.seed
    train_student(*what, stops, validate, after, steps=steps, one_step=student.one_step)


def _test(trainer: Trainer, student: Student, data: DistilledData) -> float:
    return float(trainer.test(student, datamodule=data, verbose=False)[0]["test/accuracy"])


class BestWeights(Callback):
    """Keep the weights of the best validation accuracy, and its step, in memory; ``None`` without a validation."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] | None = None
        self.step: int | None = None
        self._score = -1.0
        self._candidate: dict[str, Any] = {}

    def see(self, network: nn.Module) -> None:
        """Copy the weights that are scored."""
        self._candidate = {name: value.clone() for name, value in network.state_dict().items()}

    def keep(self, score: float, step: int) -> None:
        """Keep the copy if its score is the best so far."""
        if score > self._score:
            self._score, self.step, self.weights = score, step, self._candidate

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before a moving average is swapped out again."""
        self.see(cast(Student, pl_module).network)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare."""
        self.keep(float(trainer.callback_metrics.get("val/accuracy", -1.0)), trainer.global_step)


def random_real(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Draw a set of random real training images with the size, label form and preprocessing of a distilled one.

    They are as many as it stores; with as many as it shows, each shrunk likewise, a set of ``Random`` compares.

    Beside soft labels stand hard ones, for these images have no teacher: what the labels alone do is seen by evaluating
    a set of the distiller ``Random`` with soft labels.
    """
    assert real.train is not None
    label_kind = "hard" if distilled.label_kind == "soft" else distilled.label_kind
    rows = draw_per_class(real.train.labels, distilled.ipc, distilled.num_classes, make_generator(seed, "random-real"))
    classes = torch.arange(distilled.num_classes).repeat_interleave(distilled.ipc)
    return real_set(real, real.train.take(rows).images, classes, label_kind, RANDOM_REAL)


def random_same_labels(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Give random real images the labels of the synthetic ones of their class.

    Raises:
        UserError: the labels are soft: a teacher's answers to the synthetic images say nothing of others.
    """
    if distilled.label_kind == "soft":
        raise UserError("soft labels belong to their images: name a set of Random with soft labels as `control`")
    drawn = random_real(distilled, real, seed) if distilled.stored is None else _as_many_shown(distilled, real, seed)
    order = torch.argsort(distilled.classes.cpu(), stable=True)
    return replace(drawn, labels=distilled.labels.cpu()[order], method=SAME_LABELS)


def _as_many_shown(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Draw as many random real images as a multi-formed set shows, and shrink each to its part."""
    assert real.train is not None
    assert distilled.stored is not None
    count, factor, into = distilled.num_classes, distilled.stored.factor, distilled.preprocessing
    generator = make_generator(seed, "random-real")
    rows = draw_per_class(real.train.labels, distilled.shown_ipc, count, generator, repeat=True)
    stored = MultiFormed.of(real.train.take(rows, "cpu").images, factor, into)
    classes = torch.arange(count).repeat_interleave(distilled.shown_ipc)
    return replace(real_set(real, stored.shown(into), classes, distilled.label_kind, RANDOM_REAL), stored=stored)


def with_hard_labels(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Replace the labels by the classes, and forget a teacher's views."""
    labels = initial_labels(distilled.classes.cpu(), distilled.num_classes, "hard")
    return replace(distilled, labels=labels, label_kind="hard", views=None, temperature=1.0)


def all_real(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Take every real training image with its class.

    Raises:
        UserError: the data is streamed from disk.
    """
    train = real.train
    assert train is not None
    if real.on_disk:
        raise UserError(f"{real.name} is read from disk: training on all of it needs it in memory (data.on_disk false)")
    images, labels = train.everything()
    return real_set(real, images, labels, "hard", ALL_REAL)


SOURCES: dict[str, Callable[[DistilledSet, RealData, int], DistilledSet]] = {
    DISTILLED: lambda distilled, real, seed: distilled,
    RANDOM_REAL: random_real,
    HARD_LABELS: with_hard_labels,
    SAME_LABELS: random_same_labels,
    WITHOUT_VIEWS: lambda distilled, real, seed: replace(distilled, views=None),
    ALL_REAL: all_real,
}
"""By name: what a student sees, from the distilled set, its real data and the student's seed."""

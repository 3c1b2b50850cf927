"""Classifiers trained on the real data: teachers, and the architectures that MetaDD compares."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.augment.frepo import Augmentation, default_strategy
from lightning_dd.data.images import Split
from lightning_dd.data.sampling import EvalBatches, ShuffledStream, next_batch, pass_through
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network
from lightning_dd.models.pool import rest
from lightning_dd.pretrained.once import Made, fit_quietly, read_trained, state_of, train_once
from lightning_dd.pretrained.task import Task
from lightning_dd.students.recipe import warmup_cosine
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.scoring import ScoredModule
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe:
    """How a network is trained on the real data.

    Args:
        steps: training steps.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        batch_size: images per step.

    Raises:
        UserError: a number is out of range.
    """

    steps: int = 1000
    lr: float = 2e-3
    weight_decay: float = 0.01
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not 0 < self.lr < float("inf") or self.weight_decay < 0:
            raise UserError(
                "training on the real data needs steps and batch_size >= 1, lr > 0 and weight_decay >= 0, got "
                f"{self.steps}, {self.batch_size}, {self.lr} and {self.weight_decay}"
            )


def trained_classifier(
    architecture: str, task: Task, recipe: ClassifierRecipe, seed: int, file: Path | str | None = None
) -> tuple[Network, float]:
    """Return a network trained on this data: from a given file, from the cache, or trained now.

    Args:
        architecture: a name of the factory.
        task: the run's data.
        recipe: how it is trained.
        seed: of weights, batches and augmentation.
        file: a file of the cache for the same data, to be used instead.

    Returns:
        The network in inference mode, without parameter gradients, on the task's device, and its validation accuracy
        in [0, 1].

    Raises:
        UserError: the file is unusable or of other data, nothing is there and nothing may be trained, or the network is
            at chance on the validation split.
    """
    facts = task.facts
    network = build_network(
        architecture, facts.num_classes, facts.image_shape, derive_seed(seed, "architecture", architecture)
    )
    own = {"architecture": architecture, **task.identity()}
    what = f"architecture '{architecture}'"
    if file is None:
        settings = {key: asdict(recipe)[key] for key in ClassifierRecipe.__dataclass_fields__}
        identity = {**own, "recipe": settings, "mirror": facts.mirror, "seed": seed}
        make = partial(_train, architecture, network, task, recipe, seed)
        made = train_once("classifiers", identity, make, task, what)
    else:
        made = read_trained(Path(file), f"file of {what}")
        for name, here in own.items():
            if made.facts.get(name) != here:
                there = made.facts.get(name)
                raise UserError(f"file of {what} '{file}' is of other {name}: {there!r} there and {here!r} here")
    accuracy = _above_chance(architecture, float(made.facts["accuracy"]), facts.num_classes)
    network.load_state_dict(made.tensors())
    rest(network)
    return network.to(task.device), accuracy


def _above_chance(architecture: str, accuracy: float, num_classes: int) -> float:
    if accuracy < 1.5 / num_classes:
        raise UserError(
            f"architecture '{architecture}' is at chance on the validation split ({100 * accuracy:.1f} % of "
            f"{num_classes} classes): train it longer or with another learning rate, or choose another"
        )
    return accuracy


def _train(architecture: str, network: Network, task: Task, recipe: ClassifierRecipe, seed: int) -> Made:
    """Train; return the weights and the validation accuracy."""
    accuracy = _fit(architecture, network, task, recipe, seed)
    return state_of(network), {"accuracy": _above_chance(architecture, accuracy, task.facts.num_classes)}


def _fit(architecture: str, network: Network, task: Task, recipe: ClassifierRecipe, seed: int) -> float:
    """Train in place by an ordinary Lightning fit and return the validation accuracy."""
    strategy = default_strategy(task.facts.mirror)
    classifier = RealClassifier(network, task.train, recipe, strategy, derive_seed(seed, "classifier", architecture))
    fit_quietly(classifier, recipe.steps, task.accelerator, f"training {architecture}")
    judge = Trainer(
        accelerator=task.accelerator, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    scores = judge.validate(classifier, pass_through(EvalBatches(task.judges, 500)), verbose=False)
    return float(scores[0]["val/accuracy"])


class RealClassifier(ScoredModule):
    """Train a network on real images with cross-entropy, AdamW, warm-up and cosine; it draws its own batches.

    Args:
        network: what is trained.
        train: the training images.
        recipe: how.
        augment: operations joined by ``_``.
        seed: of batches, augmentation and dropout.
    """

    def __init__(self, network: Network, train: Split, recipe: ClassifierRecipe, augment: str, seed: int) -> None:
        super().__init__()
        self.network = network
        self.recipe, self.seed = recipe, seed
        self.augmentation = Augmentation(augment)
        self._train = train
        order = make_generator(seed, "order", device=train.labels.device)
        self._stream = ShuffledStream(len(train), recipe.batch_size, order)
        self.make_accuracy(network.num_classes)

    def scored_logits(self, images: Tensor) -> Tensor:
        """Return the network's logits."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One step on a batch of its own; ``batch`` only counts."""
        images, labels = next_batch(self._train, self._stream, self.device)
        images = self.augmentation(images, make_generator(self.seed, "augment", batch_idx))
        with seeded(derive_seed(self.seed, "dropout", batch_idx)):
            loss = F.cross_entropy(self.network(images).float(), labels)
        self.log("classifier/loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with a warm-up of a tenth of the run and a cosine to 0."""
        recipe, steps = self.recipe, max(1, self.trainer.max_steps)
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, steps // 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

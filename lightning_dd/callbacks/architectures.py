"""Frozen architectures that look at the synthetic images of a run, and when: the base of MetaDD."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_dd.data.base import RealData
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.distillers.base import Distiller, OuterTerm
from lightning_dd.losses.metadd_gradient import Architecture
from lightning_dd.models.factory import Architectures, NetworkMixture
from lightning_dd.pretrained import ClassifierRecipe, Task, trained_classifier
from lightning_dd.utils.arguments import plain_values, refuse_other
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.seeding import make_generator


@dataclass(frozen=True)
class Look:
    """How one of the architectures differs from the others: where it comes from, and how its map is made.

    Args:
        file: a trained network of your own (written by this project), in place of training.
        layer: the module that its map is made of; ``None`` finds it.
        cam: ``gradcam``, ``attention`` or ``auto``; ``None`` takes ``loss.cam``.
    """

    file: str | None = None
    layer: str | None = None
    cam: str | None = None


class ArchitectureTerm(OuterTerm, ABC):
    """An outer term of architectures that are trained on the real train split once, frozen, cached and reused.

    Args:
        settings: all options of the subclass, so that a run is not continued with others.
        architectures: names of the factory, or names with probabilities.
        fewest: architectures that must look together.
        every: outer steps between two that carry the term.
        start: outer steps before the first that carries it.
        warmup: outer steps over which it then rises linearly.
        per_step: architectures that look in a step, drawn anew each time by their probabilities; ``None`` takes all.
        training: how an architecture is trained on the real data.
        looks: exceptions for single architectures, by name.
        seed: of the architectures.

    Attributes:
        architectures: in inference mode; there from ``setup`` on.
        accuracies: of each on the validation split, in [0, 1].

    Raises:
        UserError: a setting is out of range, or an architecture is unusable.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        architectures: Architectures,
        fewest: int,
        every: int,
        start: int,
        warmup: int,
        per_step: int | None,
        training: ClassifierRecipe,
        looks: dict[str, Look] | None,
        seed: int,
    ) -> None:
        self._settings = {f"metadd.{name}": plain_values(value) for name, value in settings.items()}
        check_range("at least 0", "metadd.", start=start, warmup=warmup)
        check_range("at least 1", "metadd.", every=every)
        self.mixture = NetworkMixture.parse(architectures)
        count = len(self.mixture.names)
        if count < fewest:
            raise UserError(f"metadd needs at least {fewest} architectures to compare, got {count}")
        if per_step is not None and not fewest <= per_step <= count:
            raise UserError(
                f"metadd.per_step must be from {fewest}{' (they are compared)' * (fewest - 1)} to the "
                f"number of architectures, {count}, or none, got {per_step}"
            )
        self.looks = looks or {}
        if stray := set(self.looks) - set(self.mixture.names):
            raise UserError(f"metadd.looks names '{min(stray)}', which is none of its architectures")
        self.every, self.start, self.warmup, self.per_step = every, start, warmup, per_step
        self.training, self.seed = training, seed
        self.architectures: list[Architecture] = []
        self.accuracies: dict[str, float] = {}

    def share_at(self, outer_step: int) -> float:
        """Return how much of the term outer step ``outer_step``, counted from 0, carries, in [0, 1]; 0 if none is due.

        Override this for another rhythm.
        """
        since = outer_step - self.start
        if since < 0 or since % self.every:
            return 0.0
        return min(1.0, (since + 1) / max(1, self.warmup))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Train or load the architectures before the fit."""
        super().setup(trainer, pl_module, stage)
        data = getattr(trainer, "datamodule", None)
        if stage != "fit" or not isinstance(pl_module, Distiller) or not isinstance(data, RealData):
            return
        if self.architectures:
            return
        task = Task.of(data, trainer, pl_module.train_missing)
        if task.images is None or task.images[1] is None:
            raise UserError("metadd needs a validation split to judge its architectures: set data.val_fraction above 0")
        adapt = None
        if task.preprocessing.kind == "zca":
            standardised = Preprocessing(task.preprocessing.mean, task.preprocessing.std)
            adapt = partial(_unwhitened, whitened=task.preprocessing, standardised=standardised)
            task = task.through(standardised)
        for name in self.mixture.names:
            look = self.looks.get(name, Look())
            network, self.accuracies[name] = trained_classifier(name, task, self.training, self.seed, look.file)
            network = network.to(memory_format=torch.channels_last)
            self.architectures.append(Architecture(network, adapt, look.layer, look.cam, name))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say and log how good the architectures are: maps of poor ones mean little."""
        for name, accuracy in self.accuracies.items():
            rank_zero_info(f"MetaDD's {name} is right on {100 * accuracy:.1f} % of the validation split")
        accuracies = {f"metadd/accuracy/{name}": value for name, value in self.accuracies.items()}
        for logger in trainer.loggers:
            logger.log_metrics(accuracies, trainer.global_step)

    def looking_at(self, outer_step: int) -> list[Architecture]:
        """Return the architectures that look in an outer step: on every rank, and after a restart, the same."""
        if self.per_step is None:
            return self.architectures
        generator = make_generator(self.seed, "architectures", outer_step)
        if len(set(self.mixture.probabilities)) == 1:
            drawn = torch.randperm(len(self.architectures), generator=generator)[: self.per_step]
        else:
            drawn = torch.multinomial(torch.tensor(self.mixture.probabilities), self.per_step, generator=generator)
        return [self.architectures[index] for index in drawn.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Keep the settings, so that a run is not continued with others."""
        return {"settings": self._settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it is of other settings.
        """
        if isinstance(state_dict["settings"], dict):  # older checkpoints have a text that cannot be compared
            refuse_other("another configuration", state_dict["settings"], self._settings)


def _unwhitened(images: Tensor, whitened: Preprocessing, standardised: Preprocessing) -> Tensor:
    return standardised(whitened.inverse(images))

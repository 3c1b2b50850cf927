"""Teachers: frozen networks trained on the real data, one of them or a committee."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dd.data.images import PixelRows, Split
from lightning_dd.models.interface import Network
from lightning_dd.models.mixture import Architectures, NetworkMixture
from lightning_dd.pretrained.architectures import ArchitectureRecipe, trained_architecture
from lightning_dd.pretrained.task import Task
from lightning_dd.utils.errors import UserError

_ROWS = 512
"""Images in one forward pass of a teacher."""


@dataclass(frozen=True)
class Teacher:
    """Which networks teach, and how they are trained on the real data.

    Args:
        architecture: a name of the factory; several names, or names with weights, are a committee. ``None`` takes the
            architecture of the distiller.
        steps: training steps of each.
        lr: its peak learning rate.
        seed: of its weights and batches; kept apart from the run's seed, so that runs share teachers.
        file: a trained teacher of your own instead (written by this project); of one architecture.

    Raises:
        UserError: a number is out of range.
    """

    architecture: Architectures | None = None
    steps: int = 1000
    lr: float = 2e-3
    seed: int = 0
    file: str | None = None

    def __post_init__(self) -> None:
        ArchitectureRecipe(steps=self.steps, lr=self.lr)
        if self.architecture is not None:
            NetworkMixture.parse(self.architecture)

    def mixture(self, otherwise: str) -> NetworkMixture:
        """Return the architectures and their weights; ``otherwise`` where none is named."""
        found = NetworkMixture.parse(otherwise if self.architecture is None else self.architecture)
        if self.file is not None and len(found.names) > 1:
            raise UserError(f"teacher.file holds one network, and the committee has {len(found.names)}")
        return found

    def committee(self, task: Task, otherwise: str) -> "Committee":
        """Return the trained networks: from a file, from the cache, or trained now by all processes together.

        Args:
            task: the run's data; without images (a checkpoint that is only read), nothing is trained.
            otherwise: the architecture where none is named.

        Raises:
            UserError: one cannot be trained or read, or is at chance.
        """
        mixture = self.mixture(otherwise)
        return Committee([self._network(name, task) for name in mixture.names], mixture)

    def _network(self, architecture: str, task: Task) -> Network:
        if task.data is None:
            train = val = Split(PixelRows(torch.empty(0, *task.facts.image_shape), torch.arange(0)), torch.arange(0))
        else:
            train = task.train
            val = train if task.data.val is None else task.data.val  # only one at chance is refused
        with task.first_process_first("teacher"):
            found = trained_architecture(
                architecture,
                train,
                val,
                task.facts,
                ArchitectureRecipe(steps=self.steps, lr=self.lr),
                self.seed,
                task.accelerator,
                self.file,
                task.facts.preprocessing,
                task.train_missing and task.data is not None,
            )
        return found.network.to(task.device)


class Committee:
    """Frozen teachers and how much each of them counts.

    Args:
        networks: in inference mode, their parameters without gradient, on one device.
        mixture: their architectures and weights, in the same order.
    """

    def __init__(self, networks: list[Network], mixture: NetworkMixture) -> None:
        self.networks, self.mixture = networks, mixture

    def __iter__(self) -> Iterator[Network]:
        return iter(self.networks)

    def __len__(self) -> int:
        return len(self.networks)

    @property
    def device(self) -> torch.device:
        """Where the teachers are."""
        return next((parameter.device for parameter in self.main.parameters()), torch.device("cpu"))

    @property
    def main(self) -> Network:
        """The teacher with the largest weight."""
        return self.networks[self.mixture.names.index(self.mixture.main)]

    def draw(self, generator: torch.Generator) -> Network:
        """Draw one of them by their weights."""
        return self.networks[self.mixture.names.index(self.mixture.draw(generator))]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the weighted mean of the teachers' logits ``(N, num_classes)``: float32, on their device.

        Args:
            images: ``(N, C, H, W)``, normalised, on any device.
        """
        here = images.to(self.device)
        with torch.autocast(here.device.type, enabled=False):
            answers = (
                weight * torch.cat([teacher(part).float() for part in torch.split(here, _ROWS)])
                for weight, teacher in zip(self.mixture.probabilities, self.networks, strict=True)
            )
            return torch.stack(list(answers)).sum(0) if len(self) > 1 else next(answers)

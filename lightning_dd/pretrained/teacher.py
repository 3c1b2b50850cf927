"""Teachers: frozen networks trained on the real data, one of them or a committee."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dd.models.interface import Network
from lightning_dd.models.mixture import Architectures, NetworkMixture
from lightning_dd.pretrained.classifier import ClassifierRecipe, trained_classifier
from lightning_dd.pretrained.task import Task
from lightning_dd.utils.errors import UserError

_ROWS = 512
"""Images in one forward pass of a teacher."""


@dataclass(frozen=True)
class Teacher(ClassifierRecipe):
    """Which networks teach, and how they are trained on the real data.

    Args:
        architecture: a name of the factory; several names, or names with weights, are a committee. ``None`` takes the
            architecture of the distiller.
        seed: of weights and batches; kept apart from the run's seed, so that runs share teachers.
        file: a trained teacher of your own instead (written by this project); of one architecture.
        steps: training steps of each.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        batch_size: images per step.

    Raises:
        UserError: a number is out of range.
    """

    architecture: Architectures | None = None
    seed: int = 0
    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
        networks = [trained_classifier(name, task, self, self.seed, self.file)[0] for name in mixture.names]
        return Committee(networks, mixture)


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
            answers = [
                torch.cat([teacher(part).float() for part in torch.split(here, _ROWS)]) for teacher in self.networks
            ]
        if len(answers) == 1:
            return answers[0]
        weights = torch.tensor(self.mixture.probabilities, device=here.device)
        return torch.einsum("t,tnc->nc", weights, torch.stack(answers))

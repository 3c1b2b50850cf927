"""Classifiers trained on the real data: teachers, committees of them, and the architectures that MetaDD compares."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.augment.frepo import Augmentation
from lightning_dd.data.sampling import answers, next_batch
from lightning_dd.models.factory import Architectures, NetworkMixture, build_network
from lightning_dd.models.interface import Network
from lightning_dd.models.pool import rest
from lightning_dd.pretrained.task import Made, Task, fit, read_trained, train_once
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded

_ROWS = 512
"""Images in one forward pass of a teacher."""


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
        check_range("at least 1", "training on the real data: ", steps=self.steps, batch_size=self.batch_size)
        check_range("positive", "training on the real data: ", lr=self.lr)
        check_range("at least 0", "training on the real data: ", weight_decay=self.weight_decay)


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

    def make() -> Made:
        accuracy = _fit(architecture, network, task, recipe, seed)
        if accuracy < 1.5 / facts.num_classes:
            raise UserError(
                f"{what} is at chance on the validation split ({100 * accuracy:.1f} % of {facts.num_classes} classes): "
                "train it longer or with another learning rate, or choose another"
            )
        return network.state_dict(), {"accuracy": accuracy}

    facts, what = task.facts, f"architecture '{architecture}'"
    weights = derive_seed(seed, "architecture", architecture)
    network = build_network(architecture, facts.num_classes, facts.image_shape, weights)
    if file is None:
        settings = {setting.name: getattr(recipe, setting.name) for setting in fields(ClassifierRecipe)}
        identity = {"architecture": architecture, "recipe": settings, "mirror": facts.mirror, "seed": seed}
        identity["augmentation"] = "edges repeat"  # those of earlier versions had learned from zeros outside of images
        trained = train_once("classifiers", identity, make, task, what)
    else:
        trained = read_trained(Path(file), f"file of {what}")
        for name, here in {"architecture": architecture, **task.identity()}.items():
            if (there := trained.facts.get(name)) != here:
                raise UserError(f"file of {what} '{file}' is of other {name}: {there!r} there and {here!r} here")
    network.load_state_dict(trained.tensors())
    rest(network)
    return network.to(task.device), float(trained.facts["accuracy"])


def _fit(architecture: str, network: Network, task: Task, recipe: ClassifierRecipe, seed: int) -> float:
    """Train in place with cross-entropy; return the validation accuracy in [0, 1]."""
    seed = derive_seed(seed, "classifier", architecture)
    stream, augmentation = task.stream(recipe.batch_size, seed), Augmentation("auto", task.facts.mirror)

    def loss_at(step: int) -> Tensor:
        images, labels = next_batch(task.train, stream, task.device)
        images = augmentation(images, make_generator(seed, "augment", step))
        with seeded(derive_seed(seed, "dropout", step)):
            return F.cross_entropy(network(images).float(), labels)

    adamw = Recipe(
        steps=recipe.steps,
        lr=recipe.lr,
        warmup=recipe.steps // 10,
        final_lr=0.0,
        optimizer="adamw",
        weight_decay=recipe.weight_decay,
    )
    fit(task, network, adamw, loss_at, f"training {architecture}")
    network.eval()
    correct = answers(network, task.validation, task.device).argmax(1) == task.validation.labels.cpu()
    return float(correct.float().mean())


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

    def mixture(self, otherwise: Architectures) -> NetworkMixture:
        """Return the architectures and their weights; ``otherwise`` where none is named."""
        found = NetworkMixture.parse(otherwise if self.architecture is None else self.architecture)
        if self.file is not None and len(found.names) > 1:
            raise UserError(f"teacher.file holds one network, and the committee has {len(found.names)}")
        return found

    def committee(self, task: Task, otherwise: Architectures) -> "Committee":
        """Return the trained networks: from a file, from the cache, or trained now by all processes together.

        Args:
            task: the run's data; without images (a checkpoint that is only read), nothing is trained.
            otherwise: the architecture, or several, where none is named.

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

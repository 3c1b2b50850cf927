"""Classifiers trained on the real data: teachers, committees of them, and the architectures that MetaDD compares."""

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.augment.crops import draw_crops, draw_padded, resample
from lightning_dd.augment.frepo import Augmentation, Operation
from lightning_dd.data.cache import shapes_of
from lightning_dd.data.images import DataFacts
from lightning_dd.data.sampling import answers, next_batch
from lightning_dd.losses.matching import batch_statistics
from lightning_dd.models.factory import Architectures, NetworkMixture, build_network
from lightning_dd.models.interface import Network
from lightning_dd.models.pool import rest
from lightning_dd.pretrained.task import Made, Task, fit, is_trained, read_trained, train_once
from lightning_dd.pretrained.weights import fetch_weights, fit_weights, read_weights
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError, check_range, unknown_name
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded

_ROWS = 512
"""Images in one forward pass of a teacher."""
_PRIOR = 5.0
"""Points of accuracy that make a teacher's vote e times as large."""

_SGD = Recipe(lr=0.1, warmup=0, final_lr=0.0, augment="none", optimizer="sgd", momentum=0.9, schedule="cosine")

TRAININGS: dict[str, tuple[Recipe, int]] = {
    # SRe2L's squeeze_cifar.py: 78.7 % on CIFAR-100 with ResNet-18. RDED trains its teachers after SRe2L.
    "sre2l_cifar": (replace(_SGD, epochs=200, batch_size=128, weight_decay=5e-4), 4),
    # zeyuanyin/tiny-imagenet, train.py and train_rn18.sh: 59.6 % with ResNet-18.
    "sre2l_tiny": (replace(_SGD, epochs=50, lr=0.2, warmup=5, batch_size=256, weight_decay=1e-4), 0),
}
"""Published trainings on real data by name: how, and with how many pixels of black images are padded before a crop of
their size is cut; 0 cuts random resized crops. Half of the images are mirrored where the data may be."""


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe:
    """How a network is trained on the real data: by AdamW with FRePo's augmentation, or as published.

    Args:
        protocol: a published training (:data:`TRAININGS`), which says all but its length; ``None`` takes what follows.
        epochs: passes over the data in place of the published ones.
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
    protocol: str | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.protocol is not None and self.protocol not in TRAININGS:
            raise unknown_name("protocol of training on the real data", self.protocol, TRAININGS)
        for name in ("steps", "lr", "weight_decay", "batch_size") if self.protocol else ("epochs",):
            if getattr(self, name) != getattr(ClassifierRecipe, name):
                raise UserError(
                    f"training on the real data: {name} goes without a protocol, epochs with one of "
                    f"{', '.join(TRAININGS)}"
                )
        counts = {"steps": self.steps, "batch_size": self.batch_size, "epochs": self.epochs}
        check_range("at least 1", "training on the real data: ", **counts)
        check_range("positive", "training on the real data: ", lr=self.lr)
        check_range("at least 0", "training on the real data: ", weight_decay=self.weight_decay)

    def recipe(self) -> Recipe:
        """Return optimizer, schedule and length."""
        if self.protocol is not None:
            published = TRAININGS[self.protocol][0]
            return published if self.epochs is None else replace(published, epochs=self.epochs)
        numbers = {"steps": self.steps, "lr": self.lr, "weight_decay": self.weight_decay, "batch_size": self.batch_size}
        return Recipe(**numbers, warmup=self.steps // 10, final_lr=0.0, optimizer="adamw")  # type: ignore[arg-type]

    def identity(self) -> dict[str, Any]:
        """Return what the trained weights depend on; settings that came later are left out where they are not used."""
        given = {setting.name: getattr(self, setting.name) for setting in fields(ClassifierRecipe)}
        return {name: value for name, value in given.items() if value is not None}

    def augmentation(self, task: Task) -> Operation:
        """Return what is done to a batch of normalised images, with a CPU generator."""
        if self.protocol is None:
            return Augmentation("auto", task.facts.mirror)
        padding, mirrors = TRAININGS[self.protocol][1], 0.5 if task.facts.mirror else 0.0
        channels, height, width = task.facts.image_shape
        black = task.preprocessing(torch.zeros(1, channels, height, width)).mean((0, 2, 3)).to(task.device)

        def cut(images: Tensor, generator: torch.Generator) -> Tensor:
            count, sides = len(images), (height, width)
            if padding:
                boxes = draw_padded(count, sides, padding, generator)
            else:
                boxes = draw_crops(count, sides, 0.08, generator)
            flips = torch.rand(count, generator=generator) < mirrors
            return resample(images, boxes.to(images.device), flips.to(images.device), black if padding else None)

        return cut


def trained_classifier(
    architecture: str,
    task: Task,
    recipe: ClassifierRecipe,
    seed: int,
    file: Path | str | None = None,
    weights: str | None = None,
) -> tuple[Network, float]:
    """Return a network trained on this data: from a given file, from the cache, or trained now.

    Args:
        architecture: a name of the factory.
        task: the run's data.
        recipe: how it is trained.
        seed: of weights, batches and augmentation.
        file: a file of the cache for the same data, or of a network's weights, to be used instead.
        weights: those a library publishes, to be used instead (:func:`~lightning_dd.pretrained.weights.fetch_weights`).

    Returns:
        The network in inference mode, without parameter gradients, on the task's device, and its validation accuracy
        in [0, 1].

    Raises:
        UserError: the file is unusable or of other data, nothing is there and nothing may be trained, or the network is
            at chance on the validation split.
    """

    def make() -> Made:
        accuracy = _fit(architecture, network, task, recipe, seed)
        _refuse_chance(accuracy, task, what)
        return network.state_dict(), {"accuracy": accuracy}

    facts, what = task.facts, f"architecture '{architecture}'"
    network = initial_network(architecture, facts, seed)
    if weights is not None or (file is not None and not is_trained(Path(file))):
        accuracy = _take_weights(network, architecture, task, file, weights)
        return network.to(task.device), accuracy
    if file is None:
        identity = {"architecture": architecture, "recipe": recipe.identity(), "mirror": facts.mirror, "seed": seed}
        identity["augmentation"] = "edges repeat"  # those of earlier versions had learned from zeros outside of images
        trained = train_once("classifiers", identity, make, task, what, shapes_of(network.state_dict()))
    else:
        trained = read_trained(Path(file), f"file of {what}")
        for name, here in {"architecture": architecture, **task.identity()}.items():
            if (there := trained.facts.get(name)) != here:
                raise UserError(f"file of {what} '{file}' is of other {name}: {there!r} there and {here!r} here")
    network.load_state_dict(trained.tensors())
    rest(network)
    return network.to(task.device), float(trained.facts["accuracy"])


def initial_network(architecture: str, facts: DataFacts, seed: int) -> Network:
    """Return the network that :func:`trained_classifier` of the same seed begins with, on the CPU."""
    start = derive_seed(seed, "architecture", architecture)
    return build_network(architecture, facts.num_classes, facts.image_shape, start)


def _take_weights(
    network: Network, architecture: str, task: Task, file: Path | str | None, weights: str | None
) -> float:
    """Give a network weights that others trained; return its validation accuracy, NaN where there are no images."""
    what = f"architecture '{architecture}'"
    with task.first_process_first(what):  # one fetches, the others find it
        if weights is None:
            state = read_weights(Path(str(file)))
        else:
            state = fetch_weights(architecture, weights, task.preprocessing)
    fit_weights(network, state, task.facts, f"weights '{weights or file}' of {what}")
    rest(network)
    if task.images is None:  # a checkpoint that is only read
        return float("nan")
    accuracy = _accuracy(network.to(task.device), task)
    _refuse_chance(accuracy, task, what)
    return accuracy


def _fit(architecture: str, network: Network, task: Task, recipe: ClassifierRecipe, seed: int) -> float:
    """Train in place with cross-entropy; return the validation accuracy in [0, 1]."""
    seed, how = derive_seed(seed, "classifier", architecture), recipe.recipe()
    stream = task.stream(how.batch_for(len(task.train), task.facts.num_classes), seed)
    augmentation = recipe.augmentation(task)

    def loss_at(step: int) -> Tensor:
        images, labels = next_batch(task.train, stream, task.device)
        images = augmentation(images, make_generator(seed, "augment", step))
        with seeded(derive_seed(seed, "dropout", step)):
            return F.cross_entropy(network(images).float(), labels)

    network.to(memory_format=torch.channels_last)  # up to 1.8 times as fast on a CPU
    fit(task, network, how, loss_at, f"training {architecture}")
    network.eval()
    accuracy = _accuracy(network, task)
    network.to(memory_format=torch.contiguous_format)  # as one that is read from the cache
    return accuracy


@torch.no_grad()
def _accuracy(network: Network, task: Task) -> float:
    """Return the accuracy on the validation split in [0, 1]."""
    correct = answers(network, task.validation, task.device).argmax(1) == task.validation.labels.cpu()
    return float(correct.float().mean())


def _refuse_chance(accuracy: float, task: Task, what: str) -> None:
    """Refuse a network at chance."""
    classes = task.facts.num_classes
    if accuracy < 1.5 / classes:
        raise UserError(
            f"{what} is at chance on the validation split ({100 * accuracy:.1f} % of {classes} classes): "
            "train it longer or with another learning rate, or choose another"
        )


@dataclass(frozen=True)
class Teacher(ClassifierRecipe):
    """Which networks teach, and how they are trained on the real data.

    Args:
        architecture: a name of the factory; several names, or names with weights, are a committee. ``None`` takes the
            architecture of the distiller.
        seed: of weights and batches; kept apart from the run's seed, so that runs share teachers.
        file: a trained teacher of your own instead, of one architecture: a file of this project's cache, or weights as
            safetensors or as a PyTorch file of a state dict, by the names of the architecture's library.
        weights: what timm or torchvision publishes for the architecture instead: ``default``, or a name as
            ``IMAGENET1K_V1`` of torchvision and ``a1_in1k`` of timm. Of ImageNet's classes those of the data are kept.
        protocol: a published training (:data:`TRAININGS`) in place of AdamW: ``sre2l_cifar`` or ``sre2l_tiny``.
        epochs: passes over the data in place of the published ones.
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
    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file is not None and self.weights is not None:
            raise UserError("teacher.file and teacher.weights exclude each other")
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
        trained = [trained_classifier(name, task, self, self.seed, self.file, self.weights) for name in mixture.names]
        return Committee([network for network, _ in trained], mixture, [accuracy for _, accuracy in trained])


class Committee:
    """Frozen teachers and how much each of them counts.

    Args:
        networks: in inference mode, their parameters without gradient, on one device.
        mixture: their architectures and weights, in the same order.
        accuracies: on the validation split, in [0, 1], likewise; ``None`` takes all for equally good.
    """

    def __init__(self, networks: list[Network], mixture: NetworkMixture, accuracies: list[float] | None = None) -> None:
        self.networks, self.mixture = networks, mixture
        self.accuracies = [1.0] * len(networks) if accuracies is None else accuracies

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

    def voters(self, count: int, generator: torch.Generator, main: bool = True) -> list[tuple[Network, float]]:
        """Draw some of them by their weights, without replacement, each with its share of the votes.

        A share is the softmax, over those drawn, of accuracies in percent over 5: the prior of CV-DD (Cui et al. 2025,
        arXiv 2501.07575; its accuracies are of students of what each teacher recovered alone).

        Args:
            count: at most all.
            generator: CPU generator.
            main: whether the teacher with the largest weight may be drawn.
        """
        weights = torch.tensor(self.mixture.probabilities)
        if not main:
            weights[self.mixture.names.index(self.mixture.main)] = 0
        drawn = torch.multinomial(weights, count, generator=generator).tolist()
        shares = torch.tensor([100 * self.accuracies[index] / _PRIOR for index in drawn]).softmax(0).tolist()
        return [(self.networks[index], share) for index, share in zip(drawn, shares, strict=True)]

    @torch.no_grad()
    def logits(self, images: Tensor, as_batch: bool = False) -> Tensor:
        """Return the weighted mean of the teachers' logits ``(N, num_classes)``: float32, on their device.

        Args:
            images: ``(N, C, H, W)``, normalised, on any device.
            as_batch: batch normalisation uses the statistics of these images, and not those it remembers.
        """
        here = images.to(self.device)
        parts = [here] if as_batch else torch.split(here, _ROWS)
        answers = []
        for teacher in self.networks:
            alone = batch_statistics(teacher, remember=False) if as_batch else nullcontext()
            with torch.autocast(here.device.type, enabled=False), alone:
                answers.append(torch.cat([teacher(part).float() for part in parts]))
        if len(answers) == 1:
            return answers[0]
        weights = torch.tensor(self.mixture.probabilities, device=here.device)
        return torch.einsum("t,tnc->nc", weights, torch.stack(answers))

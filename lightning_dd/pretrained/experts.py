"""Expert trajectories: networks trained on the real data by plain SGD, their parameters kept after every epoch.

MTT (Cazenavette et al. 2022, arXiv 2203.11932) matches stretches of them. There is one file per expert in the cache
folder, so an interrupted stage goes on with the experts that are missing. A file takes ``4 (epochs + 1) P`` bytes for P
parameters: 65 MB for 50 epochs of the literature's ConvNet on CIFAR-10.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_dd.augment.siamese import siamese
from lightning_dd.data.sampling import next_batch
from lightning_dd.losses.krr import centred_one_hot, initial_labels
from lightning_dd.losses.labels import student_loss
from lightning_dd.losses.trajectory import parameter_vector
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network
from lightning_dd.pretrained.task import Made, Task, fit, train_once
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.seeding import derive_seed, make_generator


@dataclass(frozen=True)
class ExpertRecipe:
    """How an expert is trained: SGD without momentum, decay or schedule.

    Args:
        augment: operations of :mod:`lightning_dd.augment.siamese`, each image with its own numbers; ``none`` for none.
        epochs: passes over the training split; the last, incomplete batch of a pass is dropped.
        lr: learning rate.
        batch_size: images per step, at most the whole split.
        labels: ``hard`` (cross-entropy) or ``centred`` (half the squared error on centred one-hot vectors).

    Raises:
        UserError: a number is out of range, or an operation is unknown.
    """

    augment: str
    epochs: int = 50
    lr: float = 0.01
    batch_size: int = 256
    labels: str = "hard"

    def __post_init__(self) -> None:
        check_range("at least 1", trajectory_epochs=self.epochs, expert_batch_size=self.batch_size)
        check_range("positive", expert_lr=self.lr)
        siamese(self.augment)


def expert_file(architecture: str, task: Task, recipe: ExpertRecipe, seed: int, index: int) -> Path:
    """Return the file of one expert's trajectory; the expert is trained now if the cache lacks it.

    Args:
        architecture: a name of the factory.
        task: the run's data.
        recipe: how it is trained.
        seed: of all experts.
        index: which of them.

    Raises:
        UserError: the architecture keeps batch statistics, the expert is missing and may not be trained, it diverged,
            or the cache folder cannot be written.
    """

    def make() -> Made:
        _refuse_batch_statistics(architecture, network)
        snapshots = _trajectory(network, task, recipe, own, f"expert {index}")
        if not bool(torch.isfinite(snapshots[-1]).all()):
            raise UserError(
                f"{what} diverged: its parameters are not finite after {recipe.epochs} epochs; lower expert_lr "
                f"(now {recipe.lr})"
            )
        return {_name(epoch): snapshot for epoch, snapshot in enumerate(snapshots)}, {}

    facts, own = task.facts, derive_seed(seed, "expert", architecture, index)
    network = build_network(architecture, facts.num_classes, facts.image_shape, derive_seed(own, "weights"))
    shapes = {_name(epoch): tuple(parameter_vector(network).shape) for epoch in range(recipe.epochs + 1)}
    what = f"expert {index} of '{architecture}'"
    identity = {"architecture": architecture, "recipe": asdict(recipe), "seed": seed, "index": index}
    file = train_once("experts", identity, make, task, what, shapes).file
    if file is None:
        raise UserError(f"{what} cannot be kept: set LIGHTNING_DD_CACHE to a folder that can be written")
    return file


class Trajectories:
    """Trajectories on disk. Files are mapped, not read: only the snapshots asked for are loaded.

    Args:
        files: from :func:`expert_file`; they stay open, so a cache that is cleared meanwhile does no harm.
        device: where snapshots go.
    """

    def __init__(self, files: Sequence[Path], device: torch.device | str = "cpu") -> None:
        self._files: list[Any] = [safe_open(file, framework="pt", device=str(device)) for file in files]

    def snapshot(self, expert: int, epoch: int) -> Tensor:
        """Return an expert's parameters ``(P,)`` after ``epoch`` epochs; 0 is before the first. Not to be changed."""
        return cast(Tensor, self._files[expert].get_tensor(_name(epoch)))


def _refuse_batch_statistics(architecture: str, network: Network) -> None:
    """Refuse batch normalisation: its running statistics are no parameters, and so cannot be matched."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    if any(isinstance(module, kinds) and module.track_running_stats for module in network.modules()):
        raise UserError(
            f"trajectory matching cannot use architecture '{architecture}': its batch statistics are no parameters; "
            "choose one without batch normalisation, as convnet:norm=instance (or group, layer, none)"
        )


def _trajectory(network: Network, task: Task, recipe: ExpertRecipe, seed: int, title: str) -> list[Tensor]:
    """Train an expert in inference mode, as the inner steps run; return its parameters after every epoch from 0 on."""
    stream, augment = task.stream(recipe.batch_size, seed), siamese(recipe.augment, shared=False)
    per_epoch, count = stream.size // stream.batch_size, network.num_classes
    snapshots: list[Tensor] = []

    def loss_at(step: int) -> Tensor:
        if step % per_epoch == 0:
            snapshots.append(parameter_vector(network).cpu())
        images, classes = next_batch(task.train, stream, task.device)
        images = augment(images, make_generator(seed, "augment", step))
        hard = recipe.labels == "hard"
        targets = initial_labels(classes, count, "hard") if hard else centred_one_hot(classes, count)
        return student_loss(network(images), targets, recipe.labels)

    sgd = Recipe(steps=recipe.epochs * per_epoch, lr=recipe.lr, optimizer="sgd", warmup=0, schedule="constant")
    fit(task, network.eval(), sgd, loss_at, title)
    return [*snapshots, parameter_vector(network).cpu()]


def _name(epoch: int) -> str:
    return f"epoch{epoch}"

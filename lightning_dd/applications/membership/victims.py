"""Victims and shadow models: a network trained on a set, and its answers about a pool after several lengths."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.applications.membership.attacks import Array, Scores
from lightning_dd.augment.frepo import Augmentation
from lightning_dd.data.sampling import ShuffledStream
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.losses.labels import initial_labels
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network
from lightning_dd.students.recipe import Recipe, student_loss
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded

_SLICE = 500


@dataclass(frozen=True)
class PoolScores:
    """What one network answers about every image of a pool, after several training lengths.

    Args:
        lengths: ``(L,)`` training steps.
        logits: ``(L, P, C)`` float32.
        losses: ``(L, P)`` float32: the loss the network was trained with, on the true class.
        labels: ``(P,)`` int64 true classes.
        inside: ``(P,)`` bool, whether the image belongs to the data the training set was made from.
        held_out: ``(P,)`` bool, whether the image is one of the held-out ones (shadow models may learn from these).
    """

    lengths: Array
    logits: Array
    losses: Array
    labels: Array
    inside: NDArray[np.bool_]
    held_out: NDArray[np.bool_]

    def at(self, index: int) -> tuple[Scores, Scores]:
        """Return the answers about members and non-members after the index-th length."""
        members, others = self.inside & ~self.held_out, self.held_out
        whole = Scores(self.logits[index], self.losses[index], self.labels)
        return whole.take(members), whole.take(others)

    def save(self, path: Path) -> Path:
        """Write a safetensors file, atomically."""
        return write_atomically(path, lambda temporary: save_file(vars(self), temporary))

    @classmethod
    def load(cls, path: Path) -> "PoolScores | None":
        """Read a file of :meth:`save`; ``None`` if there is none, or it is damaged."""
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError):
            return None


def score_victim(
    train: DistilledSet,
    images: Tensor,
    labels: Tensor,
    architecture: str,
    recipe: Recipe,
    augmentation: Augmentation,
    lengths: Sequence[int],
    seed: int,
    device: torch.device,
) -> tuple[Array, Array]:
    """Train a fresh network on a set once and ask it about a pool after each length.

    A shorter length is a stop on the way to the longer ones, so the recipe's learning rate should be constant. Views
    stored with the set are its augmentation.

    Args:
        train: what the victim learns from.
        images: the pool ``(P, C, H, W)``, normalised as the set is.
        labels: true classes ``(P,)``.
        architecture: a name of the factory.
        recipe: loss, optimizer, batch size.
        augmentation: what ``recipe.augment`` stands for.
        lengths: training steps, increasing.
        seed: of weights, batch order, augmentation and dropout.
        device: where.

    Returns:
        Logits ``(L, P, num_classes)`` and losses ``(L, P)``, float32.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    network = build_network(architecture, train.num_classes, train.image_shape, derive_seed(seed, "network"))
    network = network.to(device).to(memory_format=torch.channels_last)
    optimizer = recipe.build_optimizer(network)
    scheduler = recipe.scheduler(optimizer, lengths[-1])
    batches = _batches(train, recipe.batch_size, augmentation, seed, device)
    answers = []
    with seeded(derive_seed(seed, "dropout")):
        for step in range(1, lengths[-1] + 1):
            batch, targets = next(batches)
            own = network(batch.contiguous(memory_format=torch.channels_last))
            torch.autograd.backward(student_loss(own, targets, train.label_kind, train.temperature))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            if step in lengths:
                answers.append(_ask(network, images))
    logits = torch.stack(answers)
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"a victim's training diverged; lower lr (now {recipe.lr}) or the training lengths")
    return logits.numpy(), true_losses(logits, labels.cpu(), train.label_kind).numpy()


def true_losses(logits: Tensor, labels: Tensor, label_kind: str) -> Tensor:
    """Return each sample's loss on its true class, of the kind the victim was trained with.

    Half the squared error to FRePo's centred target for regression labels, cross-entropy for hard and soft ones.

    Args:
        logits: ``(L, P, C)``.
        labels: ``(P,)`` true classes.
        label_kind: form of the labels the victim was trained on.

    Returns:
        ``(L, P)``.
    """
    if label_kind in ("hard", "soft"):
        return F.cross_entropy(logits.movedim(-1, 1), labels.expand(len(logits), -1), reduction="none")
    return 0.5 * (logits - initial_labels(labels, logits.shape[-1], "centred")).square().sum(-1)


def _batches(
    train: DistilledSet, batch_size: int, augmentation: Augmentation, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled, augmented batches and their labels without end."""
    images, labels = train.images.to(device), train.labels.to(device)
    views = train.views and train.views.to(device)
    stream = ShuffledStream(len(images), batch_size, make_generator(seed, "order", device=device))
    draws = make_generator(seed, "augment")
    for step in itertools.count():
        rows = stream.next()
        if views is None:
            yield augmentation(images[rows], draws), labels[rows]
        else:
            yield views.replay(images, step // (stream.size // stream.batch_size), rows)


@torch.no_grad()
def _ask(network: Network, images: Tensor) -> Tensor:
    """Return the logits ``(P, C)`` in inference mode, on the CPU."""
    network.eval()
    device = next(network.parameters()).device
    parts = [
        network(part.to(device).contiguous(memory_format=torch.channels_last)).float().cpu()
        for part in torch.split(images, _SLICE)
    ]
    network.train()
    return torch.cat(parts)

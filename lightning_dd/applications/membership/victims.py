"""Victims and shadow models: a network trained on a set, and its answers about a pool after several lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dd.applications.membership.attacks import Array, Scores
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.losses.labels import initial_labels
from lightning_dd.models.factory import build_network
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError

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
        images: ``(1,)`` how many images the network learned from.
    """

    lengths: Array
    logits: Array
    losses: Array
    labels: Array
    inside: NDArray[np.bool_]
    held_out: NDArray[np.bool_]
    images: Array

    def at(self, index: int) -> tuple[Scores, Scores]:
        """Return the answers about members and non-members after the index-th length."""
        members, others = self.inside & ~self.held_out, self.held_out
        whole = Scores(self.logits[index], self.losses[index], self.labels)
        return whole.take(members), whole.take(others)


def score_victim(
    train: DistilledSet,
    images: Tensor,
    labels: Tensor,
    architecture: str,
    recipe: Recipe,
    lengths: Sequence[int],
    seed: int,
    device: torch.device,
) -> tuple[Array, Array]:
    """Train a fresh network on a set once and ask it about a pool after each length.

    A shorter length is a stop on the way to the longer ones, so the recipe's learning rate should be constant.

    Args:
        train: what the victim learns from.
        images: the pool ``(P, C, H, W)``, normalised as the set is.
        labels: true classes ``(P,)``.
        architecture: a name of the factory.
        recipe: how; its steps are the last length.
        lengths: training steps, increasing.
        seed: of weights, batch order, augmentation and dropout.
        device: where.

    Returns:
        Logits ``(L, P, num_classes)`` and losses ``(L, P)``, float32.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    answers: list[Tensor] = []

    @torch.no_grad()
    def ask(network: nn.Module) -> None:
        parts = [network(part.to(device)).float().cpu() for part in torch.split(images, _SLICE)]
        answers.append(torch.cat(parts))

    network = build_network(architecture, train.num_classes, train.image_shape, seed).to(device)
    train_student(network, train, replace(recipe, steps=lengths[-1]), seed, lengths, ask)
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

"""The student recipe: how a network is trained on a synthetic set. Plain torch.

One object says loss, optimizer, schedule, length and augmentation, so that the score a distiller watches while it
runs and the score the evaluation reports come from the same recipe.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dd.data.augment import Augmentation
from lightning_dd.data.stream import ShuffledStream
from lightning_dd.errors import UserError
from lightning_dd.losses.krr import half_squared_error
from lightning_dd.models.interface import Network
from lightning_dd.seeding import derive_seed, make_generator, seeded

_FREPO_STEPS = {10: 1000, 100: 2000, 200: 20000, 400: 5000, 500: 5000, 1000: 10000, 2000: 40000, 5000: 40000}


@dataclass(frozen=True)
class Recipe:
    """FRePo's evaluation recipe (Zhou et al. 2022, code) with its numbers as fields.

    Regression labels are fitted with half the squared error, hard labels with cross-entropy. Adam warms up
    linearly from 0 over ``warmup`` steps (at most half the run) and decays by a cosine to ``final_lr`` of the peak.

    Args:
        steps: training steps; ``None`` takes FRePo's table by the number of images.
        lr: peak learning rate of Adam.
        warmup: steps spent warming up.
        final_lr: last learning rate relative to the peak.
        batch_size: images per step, at most the whole set.
        augment: operations joined by ``_``; ``auto`` is FRePo's family for the data, ``none`` is none.
        ema: decay of an exponential moving average of the weights that is tested instead; 0 for none.

    Raises:
        UserError: a number is out of range.
    """

    steps: int | None = None
    lr: float = 3e-4
    warmup: int = 500
    final_lr: float = 0.01
    batch_size: int = 500
    augment: str = "auto"
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"recipe.steps must be at least 1, got {self.steps}")
        if self.lr <= 0:
            raise UserError(f"recipe.lr must be positive, got {self.lr}")
        if self.warmup < 0:
            raise UserError(f"recipe.warmup must be at least 0 steps, got {self.warmup}")
        if not 0 <= self.final_lr <= 1:
            raise UserError(f"recipe.final_lr must be in [0, 1], got {self.final_lr}")
        if not 0 <= self.ema < 1:
            raise UserError(f"recipe.ema must be in [0, 1), got {self.ema}")
        if self.batch_size < 1:
            raise UserError(f"recipe.batch_size must be at least 1, got {self.batch_size}")

    def steps_for(self, rows: int) -> int:
        """Training steps for a set of ``rows`` images: ``steps``, or FRePo's table (next larger entry).

        Example:
            >>> Recipe().steps_for(10), Recipe().steps_for(90), Recipe(steps=7).steps_for(10)
            (1000, 2000, 7)
        """
        if self.steps is not None:
            return self.steps
        return _FREPO_STEPS[min((n for n in _FREPO_STEPS if n >= rows), default=max(_FREPO_STEPS))]

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return Adam over the network's parameters."""
        return torch.optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the warm-up and cosine schedule over ``steps`` steps."""
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, steps, self.warmup, self.final_lr)
        )


def warmup_cosine(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Learning-rate factor: linear from 0 over ``warmup`` steps, then a cosine from 1 to ``final`` at ``steps``.

    The warm-up takes at most half the steps.

    Example:
        >>> [round(warmup_cosine(step, 10, warmup=2, final=0.1), 2) for step in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    rise = min(warmup, steps // 2)
    if step < rise:
        return step / rise
    progress = min(1.0, (step - rise) / max(1, steps - rise))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def student_loss(logits: Tensor, labels: Tensor, label_kind: str) -> Tensor:
    """Loss of a student: half squared error for regression labels, cross-entropy for hard ones.

    Args:
        logits: ``(N, C)``.
        labels: ``(N, C)`` in the form named by ``label_kind``.
        label_kind: ``learned``, ``centred`` or ``hard``.
    """
    if label_kind == "hard":
        return F.cross_entropy(logits.float(), labels)
    return half_squared_error(logits, labels)


def train_student(
    network: Network,
    images: Tensor,
    labels: Tensor,
    label_kind: str,
    recipe: Recipe,
    augment: str,
    seed: int,
) -> Network:
    """Train a network on a synthetic set in a bare loop, for scores watched while distilling.

    Args:
        network: trained in place, and returned in inference mode.
        images: ``(n, C, H, W)`` normalised, on the network's device.
        labels: ``(n, num_classes)``.
        label_kind: form of the labels.
        recipe: how.
        augment: the strategy that ``recipe.augment`` stands for.
        seed: of batch order and augmentation.
    """
    steps = recipe.steps_for(len(images))
    optimizer = recipe.optimizer(network)
    scheduler = recipe.scheduler(optimizer, steps)
    order = make_generator(seed, "order", device=images.device)
    stream = ShuffledStream(len(images), recipe.batch_size, order)
    augmentation, draws = Augmentation(augment), make_generator(seed, "augment")
    network.train().requires_grad_(True)
    with torch.enable_grad(), seeded(derive_seed(seed, "dropout")):
        for _ in range(steps):
            rows = stream.next()
            logits = network(augmentation(images[rows], draws))
            torch.autograd.backward(student_loss(logits, labels[rows], label_kind))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
    return network.eval().requires_grad_(False)

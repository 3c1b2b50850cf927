"""The student recipe: how a network is trained on a synthetic set, and the published ones by name. Plain torch.

One object says loss, optimizer, schedule, length and augmentation, so that the score a distiller watches while it
runs and the score the evaluation reports come from the same recipe.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_dd.augment.frepo import Augmentation
from lightning_dd.augment.siamese import digits, siamese
from lightning_dd.utils.errors import check_range, unknown_name

_FREPO_STEPS = {10: 1000, 100: 2000, 200: 20000, 400: 5000, 500: 5000, 1000: 10000, 2000: 40000, 5000: 40000}


@dataclass(frozen=True)
class Recipe:
    """How a student is trained. The defaults are FRePo's evaluation (Zhou et al. 2022, code).

    Regression labels are fitted with half the squared error, hard labels with cross-entropy, soft ones with a
    divergence (:func:`~lightning_dd.losses.labels.student_loss`). The learning rate warms up linearly from 0 over
    ``warmup`` steps (at most half the run) and then follows ``schedule``: step by step, or where the length is in
    epochs epoch by epoch, as the published codes do. Published recipes are in :data:`PROTOCOLS`.

    Args:
        steps: training steps; ``None`` takes ``epochs``, or without those FRePo's table by the number of images.
        epochs: passes over the set, in place of steps.
        lr: peak learning rate.
        warmup: steps spent warming up.
        final_lr: last learning rate of the cosine relative to the peak.
        batch_size: images per step, at most the whole set; ``None`` takes RDED's table by ipc and classes.
        augment: a strategy of :class:`~lightning_dd.augment.frepo.Augmentation`; ``auto`` is FRePo's family for the
            data, ``siamese`` that of DSA, ``digits`` that of DC for MNIST, ``none`` is none.
        ema: decay of an exponential moving average of the weights that is tested instead; 0 for none.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        momentum: of SGD.
        weight_decay: of AdamW (decoupled) or SGD.
        decay_biases: whether weight decay reaches more than weights of two and more dimensions: biases, what
            normalisation scales with, and embeddings of places.
        schedule: ``cosine`` to ``final_lr``, ``half_cosine`` (RDED's, ends at a half), ``step`` for a tenth from about
            half of the run on, or ``constant``.
        lr_of: other peak learning rates, by the start of an architecture's name: ``(("vgg", 1e-4),)``.
        temperature_squared: multiply the divergence from soft labels by T^2.
        learned_lr: take the learning rate a method learned with the set, where there is one (MTT's step size).

    Raises:
        UserError: a number is out of range or a name is unknown.
    """

    steps: int | None = None
    lr: float = 3e-4
    warmup: int = 500
    final_lr: float = 0.01
    batch_size: int | None = 500
    augment: str = "auto"
    ema: float = 0.0
    epochs: int | None = None
    optimizer: str = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay_biases: bool = True
    schedule: str = "cosine"
    lr_of: tuple[tuple[str, float], ...] = ()
    learned_lr: bool = False
    temperature_squared: bool = False

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise unknown_name(f"recipe.{name}", str(getattr(self, name)), known)
        check_range("at least 1", "recipe.", steps=self.steps, epochs=self.epochs, batch_size=self.batch_size)
        check_range("positive", "recipe.", lr=self.lr)
        check_range("at least 0", "recipe.", warmup=self.warmup, weight_decay=self.weight_decay)
        check_range("in [0, 1)", "recipe.", ema=self.ema, momentum=self.momentum)
        check_range("in [0, 1]", "recipe.", final_lr=self.final_lr)

    def batch_for(self, rows: int, num_classes: int) -> int:
        """Images per step for a set of ``rows`` images: ``batch_size``, or RDED's table (``argument.py``).

        It has 100 for ipc 50, 50 for 10 and 10 for 1, twice as many for 100 and 1,000 classes, 100 for the 200 of
        Tiny-ImageNet, and at most all images. An ipc between two entries takes that of the lower one.

        Example:
            >>> rded = protocol("rded")
            >>> rded.batch_for(100, 10), rded.batch_for(100, 100), rded.batch_for(50_000, 1000)
            (50, 20, 200)
        """
        if self.batch_size is not None:
            return self.batch_size
        ipc = rows // num_classes
        batch = 100 if ipc >= 50 else 50 if ipc >= 10 else 10
        return min(rows, 100 if num_classes == 200 else 2 * batch if num_classes >= 100 else batch)

    def steps_for(self, rows: int, num_classes: int) -> int:
        """Training steps for a set of ``rows`` images: ``steps``, ``epochs``, or FRePo's table (next larger entry).

        Example:
            >>> Recipe().steps_for(10, 10), Recipe().steps_for(90, 10), Recipe(steps=7).steps_for(10, 10)
            (1000, 2000, 7)
            >>> Recipe(epochs=300, batch_size=256).steps_for(500, 10)
            600
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return self.epochs * math.ceil(rows / self.batch_for(rows, num_classes))
        return _FREPO_STEPS[min((n for n in _FREPO_STEPS if n >= rows), default=max(_FREPO_STEPS))]

    def suited_to(self, architecture: str, learned_lr: float | None = None) -> "Recipe":
        """Return the recipe with the learning rate for an architecture and a set that came with a learned one, if any.

        Example:
            >>> recipe = Recipe(lr=1e-3, lr_of=(("vgg", 1e-4),))
            >>> recipe.suited_to("vgg11:width=16").lr, recipe.suited_to("resnet18").lr
            (0.0001, 0.001)
        """
        name = architecture.removeprefix("timm/").removeprefix("torchvision/")
        lr = next((rate for start, rate in self.lr_of if name.startswith(start)), self.lr)
        return replace(self, lr=learned_lr if self.learned_lr and learned_lr else lr)

    def augmentation(self, mirror: bool) -> Augmentation:
        """Return the augmentation of images that may, or may not, be mirrored.

        Raises:
            UserError: an operation is unknown.
        """
        if self.augment == "siamese":
            return siamese("auto", mirror, shared=False)
        if self.augment == "digits":
            return Augmentation("digits", mirror, {"digits": digits})
        return Augmentation(self.augment, mirror)

    def build_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the network's parameters."""
        make, names = OPTIMIZERS[self.optimizer]
        settings = {name: getattr(self, name) for name in names}
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter in network.named_parameters():
            matrix = parameter.ndim > 1 and "weight" in name
            (decayed if matrix or self.decay_biases else spared).append(parameter)
        groups = [{"params": decayed}, *([{"params": spared, "weight_decay": 0.0}] if spared else [])]
        return make(groups, lr=self.lr, fused=True, **settings)

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the schedule over ``steps`` steps."""
        turns = self.epochs if self.epochs and self.steps is None and steps % self.epochs == 0 else steps
        each, factor = steps // turns, SCHEDULES[self.schedule]
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(step // each, turns, self.warmup, self.final_lr)
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


def warmup_constant(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Learning-rate factor: linear from 0 over ``warmup`` steps (at most half of all), then 1."""
    rise = min(warmup, steps // 2)
    return step / rise if step < rise else 1.0


def warmup_step(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Learning-rate factor: as :func:`warmup_constant`, and a tenth of it a little after the middle.

    The official code of DC, DSA, DM and MTT runs epochs 0 to E, and drops the rate when epoch ``E // 2 + 1`` is over.
    """
    return warmup_constant(step, steps, warmup) * (0.1 if step >= (steps - 1) // 2 + 2 else 1.0)


def warmup_half_cosine(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Learning-rate factor of RDED: ``(1 + cos(pi t / (2 T))) / 2``, which ends at a half."""
    return warmup_constant(step, steps, warmup) * 0.5 * (1 + math.cos(math.pi * step / (2 * steps)))


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]] = {
    "adam": (torch.optim.Adam, ()),
    "adamw": (torch.optim.AdamW, ("weight_decay",)),
    "sgd": (torch.optim.SGD, ("momentum", "weight_decay")),
}
"""By name: the class, and the settings of a recipe that it takes beside the learning rate."""
SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "cosine": warmup_cosine,
    "half_cosine": warmup_half_cosine,
    "step": warmup_step,
    "constant": warmup_constant,
}


_RDED_RATES = (
    ("vgg", 5e-4),
    ("efficientnet", 2e-3),
    ("mobilenet", 2.5e-3),
    ("alexnet", 1e-4),
    ("vit", 1e-4),
    ("swin", 1e-4),
)

# DatasetCondensation and mtt-distillation, evaluate_synset: of E = 1,000 epochs (300 without augmentation) E + 1 are
# run. Their new optimizer at the drop also forgets its momentum, which ten steps gather again: not so here.
_SGD = Recipe(
    epochs=1001,
    lr=0.01,
    warmup=0,
    batch_size=256,
    augment="siamese",
    optimizer="sgd",
    momentum=0.9,
    weight_decay=5e-4,
    schedule="step",
)
# SRe2L's train_FKD.py and RDED's validation/main.py: the learning rate changes by the epoch, and get_parameters()
# spares from decay what is not called a weight or has one dimension.
_ADAMW = Recipe(epochs=300, lr=1e-3, warmup=0, augment="none", optimizer="adamw", weight_decay=0.01, decay_biases=False)

PROTOCOLS: dict[str, Recipe] = {
    # Zhou et al. 2022, arXiv 2206.00719: Adam, warm-up 500 steps, cosine to 1 %, steps by the number of images. Their
    # script shuffles no set, so of more than 500 images a batch is the same block of classes every time. Ours are
    # shuffled: on 500 real images of 50 classes, in 2 or 10 such blocks, students differ by 0.2 and 0.1 points, less
    # than from seed to seed.
    "frepo": Recipe(),
    # Zhao et al. 2021, arXiv 2006.05929: SGD, 300 epochs, a tenth at half of them, no augmentation.
    "dc": replace(_SGD, epochs=301, augment="none"),
    # The same code (get_daparam) for MNIST, and for no other data: longer, and augmented.
    "dc_digits": replace(_SGD, augment="digits"),
    # Zhao & Bilen 2021, arXiv 2102.08259, and DM (2023): the same for 1,000 epochs with their augmentation.
    "dsa": _SGD,
    # Cazenavette et al. 2022, arXiv 2203.11932, and DATM (Guo et al. 2024): with the step size that was learned.
    "mtt": replace(_SGD, learned_lr=True),
    # Cazenavette et al. 2023, arXiv 2305.01649: warm-up for half of the run, then a cosine; a moving average is tested.
    # Theirs takes in the weights once an epoch, which is once a step for sets of up to 256 images.
    "glad": replace(
        _SGD,
        epochs=1000,
        lr=1e-3,
        warmup=10**9,
        final_lr=0.0,
        schedule="cosine",
        ema=0.995,
        lr_of=(("vgg", 1e-4),),
    ),
    # Yin et al. 2023, arXiv 2306.13092: AdamW and a cosine on replayed views.
    "sre2l": replace(_ADAMW, final_lr=0.0, batch_size=1024),
    # The same for CIFAR (relabel_cifar.py and .sh): smaller batches, more epochs, and decay of every parameter.
    "sre2l_cifar": replace(_ADAMW, epochs=400, final_lr=0.0, batch_size=128, decay_biases=True),
    # The same for Tiny ImageNet (zeyuanyin/tiny-imagenet, train_kd.py and .sh): SGD, five epochs of warm-up, and T^2.
    # Theirs warms up from 1 % of the learning rate, ours from 0.
    "sre2l_tiny": Recipe(
        epochs=100,
        lr=0.2,
        warmup=5,
        final_lr=0.0,
        batch_size=256,
        augment="none",
        optimizer="sgd",
        momentum=0.9,
        weight_decay=1e-4,
        temperature_squared=True,
    ),
    # Sun et al. 2024, arXiv 2312.03526: AdamW by architecture, half a cosine, on replayed views.
    "rded": replace(_ADAMW, batch_size=None, schedule="half_cosine", lr_of=_RDED_RATES),
    # Zhong et al. 2026 (RD3), arXiv 2509.19743: one budget for all decoupled methods. Length, batch and optimizer are
    # those of the paper; the schedule is ours, for its code has not been compared.
    "rd3": Recipe(epochs=400, lr=1e-3, warmup=0, final_lr=0.0, batch_size=50, augment="none"),
}
"""Published evaluation protocols by name.

The same distilled set scores differently under each of them, which is the largest source of numbers that do not
compare; a table of methods by protocols shows it. What belongs to the network (FRePo's students have no normalisation,
those of DC, DSA, DM and MTT instance normalisation) is said by the architecture, and what belongs to the labels (their
form, a teacher's temperature, replayed views) travels with the set.
"""


def protocol(name: str, **changes: Any) -> Recipe:
    """Return a published recipe by name, with some of its settings replaced.

    Args:
        name: of the recipe.
        **changes: settings of :class:`Recipe`; ``None`` keeps the published value. A given learning rate is that of
            every architecture, also where one was learned with the set.

    Raises:
        UserError: the name is unknown, or a setting is out of range.

    Example:
        >>> protocol("dsa").steps_for(10, 10), protocol("frepo").steps_for(10, 10)
        (1001, 1000)
        >>> protocol("dsa", lr=0.1, warmup=None) == replace(protocol("dsa"), lr=0.1)
        True
    """
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    given = {key: value for key, value in changes.items() if value is not None}
    if "lr" in given:
        given = {"lr_of": (), "learned_lr": False} | given
    return replace(PROTOCOLS[name], **given)

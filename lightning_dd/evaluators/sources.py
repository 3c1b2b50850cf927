"""What a student can be trained on beside the distilled set itself: baselines and controls of the same size."""

from collections.abc import Callable
from dataclasses import replace

import torch

from lightning_dd.data import RealData
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distilled.datamodule import real_set
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.losses.labels import initial_labels
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator

DISTILLED, RANDOM_REAL = "distilled", "random-real"
HARD_LABELS, SAME_LABELS, WITHOUT_VIEWS, ALL_REAL = "hard-labels", "random-same-labels", "without-views", "all-real"


def random_real(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Draw a set of random real training images with the size, label form and preprocessing of a distilled one.

    Beside soft labels stand hard ones, for these images have no teacher: what the labels alone do is seen by evaluating
    a set of the distiller ``Random`` with soft labels.
    """
    assert real.train is not None
    label_kind = "hard" if distilled.label_kind == "soft" else distilled.label_kind
    rows = draw_per_class(real.train.labels, distilled.ipc, distilled.num_classes, make_generator(seed, "random-real"))
    classes = torch.arange(distilled.num_classes).repeat_interleave(distilled.ipc)
    return real_set(real, real.train.take(rows).images, classes, label_kind, RANDOM_REAL)


def random_same_labels(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Give random real images the labels of the synthetic ones of their class.

    Raises:
        UserError: the labels are soft: a teacher's answers to the synthetic images say nothing of others.
    """
    if distilled.label_kind == "soft":
        raise UserError("soft labels belong to their images: name a set of Random with soft labels as `control`")
    drawn = random_real(distilled, real, seed)
    order = torch.argsort(distilled.classes.cpu(), stable=True)
    return replace(drawn, labels=distilled.labels.cpu()[order], method=SAME_LABELS)


def with_hard_labels(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Replace the labels by the classes, and forget a teacher's views."""
    labels = initial_labels(distilled.classes.cpu(), distilled.num_classes, "hard")
    return replace(distilled, labels=labels, label_kind="hard", views=None, temperature=1.0)


def without_views(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Forget a teacher's views: what is left are the images and its labels of them."""
    return replace(distilled, views=None)


def all_real(distilled: DistilledSet, real: RealData, seed: int) -> DistilledSet:
    """Take every real training image with its class.

    Raises:
        UserError: the data is streamed from disk.
    """
    train = real.train
    assert train is not None
    if real.on_disk:
        raise UserError(f"{real.name} is read from disk: training on all of it needs it in memory (data.on_disk false)")
    images, labels = train.everything()
    return real_set(real, images, labels, "hard", ALL_REAL)


SOURCES: dict[str, Callable[[DistilledSet, RealData, int], DistilledSet]] = {
    DISTILLED: lambda distilled, real, seed: distilled,
    RANDOM_REAL: random_real,
    HARD_LABELS: with_hard_labels,
    SAME_LABELS: random_same_labels,
    WITHOUT_VIEWS: without_views,
    ALL_REAL: all_real,
}
"""By name: what a student sees, from the distilled set, its real data and the student's seed."""

"""Labels that a finished set gets, whatever it was distilled with: a teacher's answers to it, and to views of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lightning_dd.data.base import RealData
from lightning_dd.distilled.datamodule import check_match
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distilled.views import SoftViews, ViewStyle, draw_views
from lightning_dd.pretrained.classifier import Committee, Teacher
from lightning_dd.pretrained.task import Task
from lightning_dd.students.recipe import protocol as published
from lightning_dd.utils.arguments import RemembersArguments, plain_values
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.seeding import make_generator

_ROWS = 512
"""Views that are made at a time."""

AskTeachers = Callable[[Teacher | None], Committee]
"""From what a strategy says of its teachers (``None`` for the distiller's own) to the trained networks."""


class Labels(RemembersArguments, ABC):
    """Where the labels of a finished set come from: one short class, named by its class path in ``labels``.

    An object is made with its options alone and remembers them for the file. Outer steps work with labels of the kind
    ``while_distilling``; what :meth:`finish` returns is stored.

    Args:
        while_distilling: ``learned``, ``centred`` or ``hard``; ``None`` takes the method's own.

    Example:
        Smoothed labels for students that are trained with cross-entropy:

        >>> class Smoothed(Labels):
        ...     def finish(self, distilled, teachers, seed, views=True):
        ...         return replace(distilled, labels=0.9 * distilled.labels + 0.1 / distilled.num_classes)
        >>> labels = Smoothed(while_distilling="hard")
    """

    protocol: str | None = None
    """The published recipe of students that learn from the labels; ``None`` is that of the method."""

    def __init__(self, while_distilling: str | None = None) -> None:
        self.while_distilling = while_distilling

    def prepare(self, teachers: AskTeachers) -> None:
        """Have ready what :meth:`finish` needs; called on every process before a fit, as that may be on one only."""

    @abstractmethod
    def finish(self, distilled: DistilledSet, teachers: AskTeachers, seed: int, views: bool = True) -> DistilledSet:
        """Return the set with its labels and, where their form is another one, its ``label_kind``.

        Args:
            distilled: images ``(n, C, H, W)``, normalised, and the labels they were distilled with.
            teachers: trains or reads networks: ``teachers(None)`` is the distiller's own
                :class:`~lightning_dd.pretrained.Committee`, whose ``logits(images)`` are ``(n, num_classes)``.
            seed: of random numbers.
            views: label stored views too; false for a look at the set.
        """


class TeacherLabels(Labels):
    """Labels by a teacher or a committee: logits of the images, and of stored views of them for students to replay.

    After SRe2L (Yin et al. 2023, arXiv 2306.13092) and FKD (Shen & Xing 2022, arXiv 2112.01528). A view is a random
    resized crop, mirrored where images may be, mixed with another one by CutMix. With ``padding`` and ``mix`` it is
    what SRe2L trains on for CIFAR (a crop of the padded image, mixup) and for Tiny ImageNet (no mixture).

    Args:
        teacher: the networks that are asked; ``None`` takes the distiller's own teacher, or one of its architecture.
        epochs: epochs of views that are labelled and stored; 0 labels the images only, and students then augment as
            usual.
        min_scale: smallest area of a view's crop as a share of the image's; ``None`` takes the method's own, or 0.08.
        temperature: of the students' softmax.
        while_distilling: ``learned``, ``centred`` or ``hard``: the labels outer steps work with; ``None`` takes the
            method's own.
        padding: pixels of black around an image, from which a crop of its size is cut in place of a resized one.
        mix: ``cutmix``, ``mixup`` or ``none``.
        tiles: along a side of an image, shuffled in every view; ``None`` takes the method's own, or 1 for none.
        protocol: the published recipe of the students, whose batches are mixed among themselves with one box, or one
            share, for all; ``None`` takes the method's own, or ``sre2l``.
        train_mode: views are labelled in the batches that students see them in, and the teachers' batch normalisation
            uses the statistics of each batch (batch-specific soft labels of CV-DD, Cui et al. 2025, arXiv 2501.07575).

    Raises:
        UserError: a number is out of range, or a name is unknown.
    """

    def __init__(
        self,
        teacher: Teacher | None = None,
        epochs: int = 300,
        min_scale: float | None = None,
        temperature: float = 20.0,
        while_distilling: str | None = None,
        padding: int = 0,
        mix: str = "cutmix",
        tiles: int | None = None,
        protocol: str | None = None,
        train_mode: bool = False,
    ) -> None:
        super().__init__(while_distilling)
        self.protocol = protocol or "sre2l"
        self.students = published(self.protocol)
        check_range("at least 0", "labels.", epochs=epochs)
        check_range("positive", "labels.", temperature=temperature)
        if train_mode and not epochs:
            raise UserError("labels.train_mode is of stored views: set labels.epochs above 0")
        self.teacher = Teacher(**teacher) if isinstance(teacher, dict) else teacher
        self.epochs, self.temperature, self.train_mode = epochs, temperature, train_mode
        self.style = ViewStyle(0.08 if min_scale is None else min_scale, padding, mix, 1 if tiles is None else tiles)
        self._committee: Committee | None = None
        self._done: tuple[Tensor, DistilledSet] | None = None

    def prepare(self, teachers: AskTeachers) -> None:
        """Train or read the teachers."""
        self._committee = teachers(self.teacher)

    def finish(self, distilled: DistilledSet, teachers: AskTeachers, seed: int, views: bool = True) -> DistilledSet:
        """Label the images and their views; the same images are labelled once.

        Raises:
            UserError: a teacher cannot be had, or its logits do not fit half precision.
        """
        if self._done is not None and torch.equal(self._done[0], distilled.images):
            return replace(self._done[1], training=distilled.training)
        with torch.inference_mode(mode=False):  # for a student may be trained on them
            committee = self._committee or teachers(self.teacher)
            black = distilled.preprocessing(torch.zeros_like(distilled.images[:1])).mean((0, 2, 3))
            batch_size = self.students.batch_for(len(distilled), distilled.num_classes)
            style = replace(self.style, batch_size=batch_size)
            drawn = (self.epochs if views else 0, style, distilled.mirror, make_generator(seed, "views"), black)
            labelled = labelled_views(committee, distilled.images, *drawn, as_batches=self.train_mode)
            labels = committee.logits(distilled.images).cpu()
        done = replace(distilled, labels=labels, label_kind="soft", temperature=self.temperature, views=labelled)
        if views:
            self._done = (distilled.images, done)
        return done


def relabel(distilled: DistilledSet, labels: Labels, real: RealData, otherwise: str, seed: int = 0) -> DistilledSet:
    """Give a finished set, ours or converted, the labels of a strategy.

    Args:
        distilled: the set; its images stay as they are.
        labels: the strategy, as :class:`TeacherLabels`.
        real: the real data it stands for, on which teachers are trained where the cache lacks them.
        otherwise: architecture of the teacher where the strategy names none.
        seed: of the views.

    Raises:
        UserError: the real data is another one, or a teacher cannot be had.
    """
    real.use_preprocessing(distilled.preprocessing)
    real.prepare_data()
    real.setup("fit")
    check_match(distilled, real)
    task = Task.of(real)
    return labelled_by(distilled, labels, lambda given: (given or Teacher()).committee(task, otherwise), seed)


def labelled_by(distilled: DistilledSet, labels: Labels, teachers: AskTeachers, seed: int = 0) -> DistilledSet:
    """Give a finished set the labels of a strategy, by teachers that are there; it remembers what it had before."""
    relabelled = labels.finish(distilled, teachers, seed)
    before = {"label_kind": distilled.label_kind, "method": distilled.method}
    training = {**distilled.training, "relabelled": {"from": before, "labels": plain_values(labels), "seed": seed}}
    return replace(relabelled, training=training)


def labelled_views(
    committee: Committee,
    images: Tensor,
    epochs: int,
    style: ViewStyle,
    mirror: bool,
    generator: torch.Generator,
    black: Tensor | None = None,
    as_batches: bool = False,
) -> SoftViews | None:
    """Draw views of a set and have teachers label each.

    Args:
        committee: the teachers.
        images: all images ``(n, C, H, W)``, normalised.
        epochs: how often every image is seen.
        style: of crops and mixtures.
        mirror: whether views may be mirrored.
        generator: CPU generator.
        black: ``(C,)``, normalised, for a style that pads.
        as_batches: label them in the students' batches, by the statistics of each; one that is not full, which students
            leave out, is filled up with rows before it.

    Returns:
        The views on the CPU; ``None`` for 0 epochs.

    Raises:
        UserError: the logits do not fit half precision.
    """
    if epochs == 0:
        return None
    count, channels, height, width = images.shape
    shape, classes = (channels, height, width), committee.main.num_classes
    views = draw_views(epochs, shape, count, classes, generator, style, mirror, black)
    if as_batches and views.order is None:
        views = replace(views, order=torch.rand(epochs, count, generator=generator).argsort(1).int())
    shown, here = images.to(committee.device), views.to(committee.device)
    if as_batches:
        logits = torch.empty(epochs, count, classes, dtype=torch.float16, device=committee.device)
        size = min(style.batch_size, count)
        for epoch, order in enumerate(cast(Tensor, here.order).long()):
            part = [order[-size:]] * bool(count % size)
            for rows in (*part, *torch.split(order[: count - count % size], size)):
                logits[epoch, rows] = committee.logits(here.look(shown, epoch, rows), as_batch=True).half()
        return replace(views, logits=logits.cpu())
    parts = [  # a forward pass goes across epochs: a small set fills it
        committee.logits(here.look(shown, places // count, places % count)).half()
        for places in torch.split(torch.arange(epochs * count, device=committee.device), _ROWS)
    ]
    return replace(views, logits=torch.cat(parts).view(epochs, count, -1).cpu())

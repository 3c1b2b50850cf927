"""Distillers that need a teacher: a network trained on the real data before the first outer step."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dd.data.images import PixelRows, Split
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distilled.views import SoftViews
from lightning_dd.distillers.base import Distiller
from lightning_dd.distillers.relabel import SoftLabels, labelled_views, teacher_logits
from lightning_dd.models.interface import Network
from lightning_dd.pretrained import ArchitectureRecipe, accelerator_of, first_process_first, trained_architecture
from lightning_dd.synthetic.pixels import LABEL_KINDS
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator


class TeacherDistiller(Distiller):
    """A distiller with a frozen teacher, trained on the real data once, cached and reused by other runs.

    Its set may have ``labels: soft``: then labels are hard while it is distilled, and the set that is scored and
    written carries the teacher's logits of the images, and of ``soft_epochs`` epochs of views of them (random resized
    crop, mirror except for digits, CutMix), for students to replay.

    Args:
        labels: as for :class:`Distiller`, or ``soft``.
        teacher: architecture of the teacher; ``None`` takes :attr:`architecture`.
        teacher_steps: training steps of the teacher on the real data.
        teacher_lr: its peak learning rate.
        teacher_seed: of its weights and batches; kept apart from the run's seed, so that seeds of a run share it.
        teacher_file: a trained teacher of the user's own instead (written by this project).
        temperature: of the students' softmax, for soft labels.
        soft_epochs: epochs of labelled views; 0 stores the logits of the plain images only, and students then augment
            as usual.
        soft_min_scale: smallest area of a view's crop as a share of the image's.
        **kwargs: see :class:`Distiller`.

    Raises:
        UserError: an argument is out of range.
    """

    label_kinds: ClassVar[tuple[str, ...]] = (*LABEL_KINDS, "soft")

    def __init__(
        self,
        labels: str = "hard",
        teacher: str | None = None,
        teacher_steps: int = 1000,
        teacher_lr: float = 2e-3,
        teacher_seed: int = 0,
        teacher_file: str | None = None,
        temperature: float = 20.0,
        soft_epochs: int = 300,
        soft_min_scale: float = 0.08,
        **kwargs: Any,
    ) -> None:
        if labels not in self.label_kinds:
            kinds = ", ".join(self.label_kinds)
            raise UserError(f"labels of {type(self).__name__} must be one of {kinds}, got '{labels}'")
        super().__init__(labels="hard" if labels == "soft" else labels, **kwargs)
        self.soft = SoftLabels(soft_epochs, soft_min_scale, temperature) if labels == "soft" else None
        self.teacher_architecture = teacher or self.architecture
        self.teacher_recipe = ArchitectureRecipe(steps=teacher_steps, lr=teacher_lr)
        self.teacher_seed, self.teacher_file = teacher_seed, teacher_file
        self._teacher: tuple[Network, ...] = ()  # in a tuple: a registered network would enter the checkpoint
        self._labelled: tuple[Tensor, DistilledSet] | None = None

    def setup(self, stage: str) -> None:
        """Have the teacher ready on every process, where outer steps or labels need it."""
        super().setup(stage)
        if self.learns or self.soft is not None:
            _ = self.network

    @property
    def network(self) -> Network:
        """The teacher: trained or read when first asked for, by all processes together.

        Outside a run (an export from a checkpoint) it is only read.

        Raises:
            UserError: it cannot be trained or read, or is at chance.
        """
        if not self._teacher:
            if self._trainer is None:
                nothing = Split(
                    PixelRows(torch.empty(0, *self.require_facts().image_shape), torch.arange(0)), torch.empty(0)
                )
                self._teacher = (self._find_teacher(nothing, nothing, "cpu", train_missing=False),)
            else:
                data = self.real_data()
                assert data.train is not None
                judges = data.train if data.val is None else data.val  # only one at chance is refused
                with first_process_first(self.trainer, "teacher"):
                    accelerator = accelerator_of(self.trainer)
                    teacher = self._find_teacher(data.train, judges, accelerator, self.train_missing)
                self._teacher = (teacher.to(self.trainer.strategy.root_device),)
        return self._teacher[0]

    def distilled_set(self, *, views: bool = True, **training: Any) -> DistilledSet:
        """Return the current synthetic set as a file-ready object, with its soft labels if it has any."""
        plain = super().distilled_set(views=views, **training)
        if self.soft is None:
            return plain
        if self._labelled is None or not torch.equal(self._labelled[0], plain.images):
            labels, labelled = self._relabel(plain.images, views)
            done = replace(plain, labels=labels, label_kind="soft", temperature=self.soft.temperature, views=labelled)
            if not views:
                return done
            self._labelled = (plain.images, done)
        return replace(self._labelled[1], training=plain.training)

    def _relabel(self, images: Tensor, views: bool) -> tuple[Tensor, SoftViews | None]:
        """Return the teacher's logits of the images and, if asked for, of their views; all on the CPU."""
        assert self.soft is not None
        teacher = self.network
        flip = self.require_facts().mirror
        with torch.inference_mode(mode=False):  # for a student may be trained on them
            here = images.to(next(teacher.parameters()).device)
            generator = make_generator(self.seed, "views")
            labelled = labelled_views(teacher, here, self.soft, flip, generator) if views else None
            return teacher_logits(teacher, here).cpu(), labelled

    def _find_teacher(self, train: Split, val: Split, accelerator: str, train_missing: bool) -> Network:
        facts = self.require_facts()
        return trained_architecture(
            self.teacher_architecture,
            train,
            val,
            facts,
            self.teacher_recipe,
            self.teacher_seed,
            accelerator,
            self.teacher_file,
            facts.preprocessing,
            train_missing,
        ).network

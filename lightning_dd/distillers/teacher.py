"""Distillers that need a teacher: networks trained on the real data before the first outer step."""

from typing import Any, ClassVar

from lightning_dd.distillers.base import Distiller
from lightning_dd.models.interface import Network
from lightning_dd.pretrained.classifier import Committee, Teacher
from lightning_dd.synthetic.labels import Labels


class TeacherDistiller(Distiller):
    """A distiller with frozen teachers, trained on the real data once, cached and shared by runs.

    The same teachers label the finished set where ``labels`` are a teacher's and name no other.

    Args:
        labels: as for :class:`Distiller`.
        teacher: one network, or a committee of several (:class:`~lightning_dd.pretrained.Teacher`).
        **kwargs: see :class:`Distiller`.
    """

    protocol: ClassVar[str] = "dsa"

    def __init__(
        self,
        labels: str | Labels = "hard",
        teacher: Teacher = Teacher(),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        super().__init__(labels=labels, **kwargs)
        self.teacher = Teacher(**teacher) if isinstance(teacher, dict) else teacher
        self._committee: Committee | None = None  # no module: registered networks would enter the checkpoint

    def setup(self, stage: str) -> None:
        """Have the teachers ready on every process, where outer steps need them."""
        super().setup(stage)
        if self.learns:
            self.committee()

    def committee(self, teacher: Teacher | None = None) -> Committee:
        """Return trained networks: the given ones, or the method's own, trained or read when first asked for.

        Outside a run (an export from a checkpoint) they are only read.

        Raises:
            UserError: one cannot be trained or read, or is at chance.
        """
        if teacher is not None:
            return super().committee(teacher)
        if self._committee is None:
            self._committee = super().committee(self.teacher)
        return self._committee

    @property
    def network(self) -> Network:
        """The teacher of the current outer step; of a committee one that is drawn by its weight."""
        committee = self.committee()
        if len(committee) == 1 or self._trainer is None:
            return committee.main
        return committee.draw(self.step_generator("teacher"))

"""Distillers that need a teacher: a network trained on the real data before the first outer step."""

from typing import Any

from lightning_dd.distillers.base import Distiller
from lightning_dd.errors import UserError
from lightning_dd.models.interface import Network
from lightning_dd.pretrained import ArchitectureRecipe, accelerator_of, first_process_first, trained_architecture


class TeacherDistiller(Distiller):
    """A distiller with a frozen teacher, trained on the real data once, cached and reused by other runs.

    Args:
        teacher: architecture of the teacher; ``None`` takes :attr:`architecture`.
        teacher_steps: training steps of the teacher on the real data.
        teacher_lr: its peak learning rate.
        teacher_seed: of its weights and batches; kept apart from the run's seed, so that seeds of a run share it.
        teacher_file: a trained teacher of the user's own instead (written by this project).
        **kwargs: see :class:`Distiller`.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        teacher: str | None = None,
        teacher_steps: int = 1000,
        teacher_lr: float = 2e-3,
        teacher_seed: int = 0,
        teacher_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teacher_architecture = teacher or self.architecture
        self.teacher_recipe = ArchitectureRecipe(steps=teacher_steps, lr=teacher_lr)
        self.teacher_seed, self.teacher_file = teacher_seed, teacher_file
        self._teacher: tuple[Network, ...] = ()  # in a tuple: a registered network would enter the checkpoint

    @property
    def network(self) -> Network:
        """The teacher: trained or read when first asked for, by all processes together.

        Raises:
            UserError: it cannot be trained or read, or is at chance.
        """
        if not self._teacher:
            data = self.real_data()
            if data.train is None or data.val is None:
                raise UserError("a teacher is judged on a validation split: set data.val_fraction above 0")
            with first_process_first(self.trainer, "teacher"):
                trained = trained_architecture(
                    self.teacher_architecture,
                    data.train,
                    data.val,
                    data.facts,
                    self.teacher_recipe,
                    self.teacher_seed,
                    accelerator_of(self.trainer),
                    self.teacher_file,
                    data.facts.preprocessing,
                    self.train_missing,
                )
            self._teacher = (trained.network.to(self.trainer.strategy.root_device),)
        return self._teacher[0]

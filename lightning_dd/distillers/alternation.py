"""The clock that alternates outer steps with inner training of the model pool."""

from typing import Any, Protocol, runtime_checkable

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_dd.models.pool import ModelPool
from lightning_dd.utils.errors import UserError


@runtime_checkable
class HasPool(Protocol):
    """A module whose pool this clock runs."""

    pool: ModelPool

    @property
    def inner_steps(self) -> int:
        """Inner steps that follow an outer step, for a clock that has no number of its own."""

    def inner_step(self) -> bool:
        """Run one inner step; return whether a network was trained."""


class PoolAlternation(Callback):
    """After an outer step, train the network it used, then draw the next one.

    This callback owns *when*: how many inner steps follow which outer step. The pool owns *how* a network is
    trained and replaced, the distiller *what* it learns. For another rhythm override :meth:`inner_steps_at`. A
    distiller without a pool is left alone.

    Args:
        inner_steps: inner steps after an outer step that has any; ``None`` asks the distiller (FRePo takes 1).
        every: outer steps between inner trainings; the next network is drawn after every outer step all the same.

    Raises:
        UserError: ``inner_steps`` is negative or ``every`` is below 1.
    """

    def __init__(self, inner_steps: int | None = None, every: int = 1) -> None:
        if (inner_steps is not None and inner_steps < 0) or every < 1:
            raise UserError(f"PoolAlternation needs inner_steps >= 0 and every >= 1, got {inner_steps} and {every}")
        self.inner_steps = inner_steps
        self.every = every
        self._steps = 0
        self._seen = 0

    def inner_steps_at(self, outer_step: int) -> int:
        """Return how many inner steps follow outer step ``outer_step``, counted from 1."""
        return self._steps if outer_step % self.every == 0 else 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the count where the run stands."""
        self._seen = trainer.global_step
        if self.inner_steps is not None:
            self._steps = self.inner_steps
        elif isinstance(pl_module, HasPool):
            self._steps = pl_module.inner_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the inner steps due now; a batch that only accumulated gradients is no outer step."""
        if not isinstance(pl_module, HasPool) or trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        for _ in range(self.inner_steps_at(self._seen)):
            if not pl_module.inner_step():  # a fresh network waits for its first outer step
                break
        pl_module.pool.select()

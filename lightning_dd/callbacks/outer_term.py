"""Terms that are added to the outer loss of any distiller."""

from abc import ABC, abstractmethod
from functools import partial

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dd.distillers.base import Distiller, ExtraLoss
from lightning_dd.utils.errors import UserError


class OuterTerm(Callback, ABC):
    """Add a term to the outer loss of whatever distiller is fitted. A subclass answers :meth:`add`.

    Example::

        class Smooth(OuterTerm):
            def add(self, trainer, distiller, images, labels, loss):
                return loss, {"smooth": 0.1 * images.diff(dim=-1).square().mean()}

    Raises:
        UserError: (in ``setup`` for a fit) the module is no distiller, or learns nothing.
    """

    _attached: ExtraLoss | None = None

    @abstractmethod
    def add(
        self, trainer: Trainer, distiller: Distiller, images: Tensor, labels: Tensor, loss: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss so far, and the terms to add to it by name; no terms where none is due at this outer step.

        Args:
            trainer: of the run; ``trainer.global_step`` counts outer steps from 0.
            distiller: whose step it is; ``distiller.watch`` logs scalars.
            images: all synthetic images ``(n, C, H, W)``, normalised, with graph.
            labels: all synthetic labels ``(n, num_classes)``, with graph where learned.
            loss: the method's own loss and the terms before, with graph.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what there is nothing to add to."""
        if stage != "fit":
            return
        name, method = type(self).__name__, type(pl_module).__name__
        if not isinstance(pl_module, Distiller):
            raise UserError(f"{name} attaches to a distiller, got {method}")
        if not pl_module.learns:
            raise UserError(f"{name} has nothing to act on: {method} selects real images and learns none")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the term."""
        if isinstance(pl_module, Distiller):
            self._attached = partial(self.add, trainer, pl_module)
            pl_module.extra_losses.append(self._attached)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the term."""
        if isinstance(pl_module, Distiller) and self._attached in pl_module.extra_losses:
            pl_module.extra_losses.remove(self._attached)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the term from a run that broke off."""
        self.on_train_end(trainer, pl_module)

"""Distillers that select real images and learn none."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dd.data.images import Split
from lightning_dd.distillers.teacher import TeacherDistiller


class SelectionDistiller(TeacherDistiller):
    """A method that chooses images once, before the first outer step.

    It runs like any other: one outer step at learning rate 0 (``trainer.max_steps: 1``), so that scores, pictures,
    checkpoints and the exported file come the usual way.

    A subclass must answer :meth:`select`; the teacher is trained only for soft labels, or if that asks for
    :attr:`network`.

    Args:
        **kwargs: see :class:`TeacherDistiller`.
    """

    label_kinds: ClassVar[tuple[str, ...]] = ("hard", "centred")
    learns: ClassVar[bool] = False

    @abstractmethod
    def select(self, train: Split) -> Tensor:
        """Return the images ``(num_classes * ipc, C, H, W)``, normalised, in blocks of ``ipc`` by class.

        Args:
            train: all training images, normalised, and their classes.
        """

    def initialise(self, train: Split) -> None:
        """Fill the synthetic set with the selection; every rank selects the same."""
        selected = self.select(train)  # may train the teacher, which needs gradients
        with torch.no_grad():
            self.synthetic.images.copy_(selected)

    def outer_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Nothing is minimised."""
        return {"selected": 0 * images.sum()}

    def configure_optimizers(self) -> Any:
        """Return an optimizer that moves nothing."""
        return torch.optim.SGD(self.synthetic.parameters(), lr=0.0)

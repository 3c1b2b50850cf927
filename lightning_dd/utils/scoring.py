"""What distillers and students share: validation and test accuracy, counted once per sample on any number of ranks."""

from abc import ABC, abstractmethod

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy


class ScoredModule(LightningModule, ABC):
    """A LightningModule scored by the accuracy of a classifier on real images.

    Logs ``val/accuracy`` and ``test/accuracy``; predicts class probabilities.

    Attributes:
        accuracy: the metric; a subclass makes it with :meth:`make_accuracy` once the classes are known.
    """

    accuracy: MulticlassAccuracy

    @abstractmethod
    def scored_logits(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the logits ``(N, num_classes)`` that are scored."""

    def start_scoring(self) -> None:
        """Prepare what :meth:`scored_logits` needs; called before every validation, test and prediction."""

    def make_accuracy(self, num_classes: int) -> None:
        """Create the metric."""
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def on_validation_epoch_start(self) -> None:
        """Prepare scoring."""
        self.start_scoring()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count correct answers."""
        self.accuracy.update(self.scored_logits(batch[0]), batch[1])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return class probabilities ``(N, num_classes)``: the softmax of the logits."""
        return torch.softmax(self.scored_logits(batch[0]), dim=1)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy``."""
        self._log_accuracy("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``."""
        self._log_accuracy("test")

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def _log_accuracy(self, split: str) -> None:
        self.log(f"{split}/accuracy", self.accuracy.compute(), prog_bar=True, sync_dist=True)
        self.accuracy.reset()

"""What distillers and students share: validation and test accuracy, counted once per sample on any number of ranks."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_dd.utils.errors import UserError


class ScoredModule(LightningModule, ABC):
    """A LightningModule scored by the accuracy of a classifier on real images.

    Logs ``val/accuracy`` and ``test/accuracy``; predicts class probabilities.

    Attributes:
        accuracy: the metric; a subclass makes it with :meth:`make_accuracy` once the classes are known.
        by_class: the same for each class, over a test.
        class_accuracy: what it was ``(num_classes,)`` in the last test.
    """

    accuracy: MulticlassAccuracy
    by_class: MulticlassAccuracy

    @abstractmethod
    def scored_logits(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the logits ``(N, num_classes)`` that are scored."""

    def start_scoring(self) -> None:
        """Prepare what :meth:`scored_logits` needs; called before every validation, test and prediction."""

    def make_accuracy(self, num_classes: int) -> None:
        """Create the metric.

        Raises:
            UserError: there is nothing to tell apart.
        """
        if num_classes < 2:
            raise UserError(f"the data has {num_classes} class: there is nothing to tell apart, give at least two")
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.by_class = MulticlassAccuracy(num_classes, average="none")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let no checkpoint name files outside the run's folder: Lightning removes what it remembers as older ones."""
        callbacks = [] if self._trainer is None else self.trainer.checkpoint_callbacks
        for callback in callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state is not None:
                forget_foreign_paths(state, Path(callback.dirpath or "."))

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

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count correct answers, also of each class."""
        logits = self.scored_logits(batch[0])
        self.accuracy.update(logits, batch[1])
        self.by_class.update(logits, batch[1])

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``, and keep what it is of each class."""
        self._log_accuracy("test")
        self.class_accuracy: Tensor = self.by_class.compute()
        self.by_class.reset()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def _log_accuracy(self, split: str) -> None:
        self.log(f"{split}/accuracy", self.accuracy.compute(), prog_bar=True, sync_dist=True)
        self.accuracy.reset()


def forget_foreign_paths(state: dict[str, Any], folder: Path) -> None:
    """Take the paths that do not name a file directly in ``folder`` out of the state of a ``ModelCheckpoint``."""

    def own(path: str) -> bool:
        return Path(path).resolve().parent == folder.resolve() and not Path(path).is_dir()

    state["best_k_models"] = {path: score for path, score in state.get("best_k_models", {}).items() if own(path)}
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = state.get(name, "") if own(state.get(name, "")) else ""

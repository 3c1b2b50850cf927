"""The progress bar of a distillation, and the speed curve."""

import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar


class DistillationProgress(TQDMProgressBar):
    """Lightning's bar, refreshed sparingly, which also logs outer steps per second.

    The bar's numbers are read from the device only when it is refreshed, so ``refresh_rate`` bounds how often a GPU
    is waited for.

    Args:
        refresh_rate: outer steps between refreshes.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._since: tuple[float, int] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the speed at logging steps and advance the bar."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            now, step = time.perf_counter(), trainer.global_step
            if self._since is not None and step > self._since[1]:
                rate = (step - self._since[1]) / (now - self._since[0])
                pl_module.log("speed/outer_steps_per_second", rate)
            self._since = (now, step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Show losses and scores without the version number."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

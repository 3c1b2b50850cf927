"""What every distillation has: the distilled-set file, a progress bar, and the curve of its speed."""

import time
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar

from lightning_dd.distillers.base import Distiller
from lightning_dd.utils.files import hold, require_writable


class RunFiles(Callback):
    """A callback that writes files beside what the run logs.

    Args:
        dirpath: where to; ``None`` is the logger's folder, or the Trainer's root without a logger.

    Attributes:
        folder: where to; there from ``setup`` on.
    """

    folder: Path

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn where the files go, on every rank, for the Trainer broadcasts its folder."""
        log_dir = trainer.log_dir
        self.folder = Path(self.dirpath or log_dir or trainer.default_root_dir)


class ExportDistilledSet(RunFiles):
    """Write ``last.safetensors`` when the fit ends and ``best.safetensors`` at the best validation score.

    While a fit runs it holds its folders, that of the logger included, so that no other fit mixes its files in.

    Args:
        dirpath: where to; ``None`` is the logger's folder, or the Trainer's root without a logger.
        monitor: the score, larger is better.

    Raises:
        UserError: (before the first step) the folder cannot be written, or another fit is writing to it.
    """

    def __init__(self, dirpath: str | None = None, monitor: str = "val/accuracy") -> None:
        super().__init__(dirpath)
        self._held: list[BaseFileLock] = []
        self.monitor = monitor
        self.best: float | None = None
        self._validated = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out now, not after hours, that the folder cannot be written or is another run's."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            logged = {Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir}
            for folder in sorted({self.folder, *logged}):
                self._held.append(hold(require_writable(folder)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let others write there."""
        while self._held:
            self._held.pop().release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let others write there."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate what the run that this one continues did not come to."""
        self._catch_up(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``best.safetensors`` if the score improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validated = trainer.global_step
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            return
        if self.best is None or float(score) > self.best:
            self.best = float(score)
            self._write(trainer, pl_module, "best")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last.safetensors``."""
        self._catch_up(trainer)  # a run continued after its last step takes none
        self._write(trainer, pl_module, "last")

    def state_dict(self) -> dict[str, Any]:
        """Remember the best score, so that a resumed run does not overwrite a better set, and what was validated."""
        return {"best": self.best, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.best = state_dict["best"]
        self._validated = state_dict.get("validated", 0)  # checkpoints of before lack it

    def _catch_up(self, trainer: Trainer) -> None:
        """Validate the step that the run stands at if that was due and has not been done.

        A checkpoint is written before the validation of its step, and Lightning takes that validation for done.
        """
        loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
        if every and (loop.total_batch_idx + 1) % every == 0 and self._validated < trainer.global_step:
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True

    def _write(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        if isinstance(pl_module, Distiller):
            score = trainer.callback_metrics.get(self.monitor)
            scores: dict[str, Any] = {} if score is None else {self.monitor: float(score)}
            distilled = pl_module.distilled_set(outer_step=trainer.global_step, **scores)
            if trainer.is_global_zero:
                distilled.save(self.folder / f"{name}.safetensors")


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

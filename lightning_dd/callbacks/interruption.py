"""What Ctrl-C and SIGTERM do to a run: it ends in order, and says how it goes on."""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

_AGREE_EVERY = 10
"""Steps after which several processes ask each other whether one of them was told to stop."""


class Interruption(Checkpoint):
    """Finish the step under way when the run is told to stop, write a checkpoint, and say how to go on.

    The exit status is 130 after Ctrl-C and 143 after SIGTERM, on the first process of several. A second signal ends the
    run at once, and so does the first one during a validation whose step has a checkpoint already. It is a
    ``Checkpoint`` for Lightning, so that it comes last, when the inner steps are done. It needs a ``ModelCheckpoint``,
    whose last file it writes; without one a signal ends the run as Lightning does.

    Args:
        how: from the checkpoint's path to the words that say how to continue from it.
    """

    def __init__(self, how: Callable[[Path], str]) -> None:
        self.how = how
        self._asked, self._seen, self._kept = 0, 0, -1
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over both signals until Lightning gives them back to whoever had them before the fit."""
        self._trainer, self._asked, self._seen = trainer, 0, trainer.global_step
        keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        self._keeper = keepers[0] if keepers else None
        if self._keeper is None or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it, or a worker
                self._before[number] = signal.signal(number, self._take)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give both signals back: Lightning does not if one of its loggers then fails as well, as on a full disk."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._take and before is not None:  # None was not set by Python
                signal.signal(number, before)
        self._before.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if a process was told to; a batch that only accumulated gradients is no step.

        Raises:
            SystemExit: it was.
        """
        step = trainer.global_step
        if step == self._seen or self._keeper is None:
            return
        self._seen = step
        if trainer.world_size > 1:
            if step % _AGREE_EVERY:
                return
            asked = torch.tensor(float(self._asked), device=trainer.strategy.root_device)
            self._asked = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if self._asked:
            trainer.save_checkpoint(self._last())
            self._end(f"stopped after step {step}", self._asked)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note of which step there is a checkpoint."""
        self._kept = trainer.global_step

    def _take(self, number: int, frame: object) -> None:
        """Note a signal, or end at once if it is the second, or nothing would be lost."""
        alone = self._trainer.world_size == 1
        if self._asked or (alone and self._trainer.validating and self._kept == self._trainer.global_step):
            self._end("stopped at once", number)
        self._asked = number

    def _last(self) -> Path:
        """Return the path of the last checkpoint, there or yet to be written."""
        assert self._keeper is not None
        known = self._keeper.last_model_path
        return Path(known) if known else Path(self._keeper.dirpath or ".") / "last.ckpt"

    def _end(self, what: str, number: int) -> None:
        said = self.how(self._last()) if self._last().is_file() else "there is no checkpoint yet"
        rank_zero_only(print)(f"\nlightning-dd: {what}; {said}", file=sys.stderr, flush=True)
        # Lightning kills the first process, and its line with it, if it finds that another one has failed.
        raise SystemExit(128 + number if self._trainer.is_global_zero else 0)

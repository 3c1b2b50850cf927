"""``precision: auto``: bf16 where a few steps show that it is faster, else float32."""

import copy
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning_fabric.plugins.precision.precision import _PRECISION_INPUT
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_dd.utils.arguments import RemembersArguments
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import load_torch
from lightning_dd.utils.silence import quiet_trainers

FULL, HALF = "32-true", "bf16-mixed"
MARGIN = 0.9
"""Share of a step's time in float32 that one in bf16 must stay below to be taken."""

_WARMUP, _STEPS = 3, 7


class PreciseTrainer(Trainer):
    """Lightning's Trainer, whose ``precision`` the command line also takes as ``auto``.

    Args:
        precision: as Lightning's, or ``auto``: ``bf16-mixed`` where some steps show it to be faster, else ``32-true``.
    """

    def __init__(self, *args: Any, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, precision=precision, **kwargs)  # type: ignore[arg-type]


class _Stopwatch(Callback):
    """Notes when a step ends, on a CPU in seconds of its own: other processes add less to them."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        on_cpu = trainer.strategy.root_device.type == "cpu"
        self.ends.append(time.process_time() if on_cpu else time.perf_counter())


def chosen_precision(
    trainer: Mapping[str, Any],
    module: LightningModule,
    data: LightningDataModule,
    callbacks: Sequence[Any] = (),
    checkpoint: Any = None,
) -> Any:
    """Return the precision that a Trainer of these settings is to have, and say how ``auto`` was decided.

    Copies of the module and of the callbacks that act on it take some steps in each precision, so the run itself
    begins as it would have. The choice depends on a clock: the run's configuration and checkpoints name it, and a
    continued run keeps it.

    Args:
        trainer: the Trainer's arguments.
        module: what is to be fitted.
        data: its data.
        callbacks: of the run.
        checkpoint: what the run goes on from, if anything.

    Raises:
        UserError: ``auto`` is asked for with several processes, or with a checkpoint that does not name a precision.
    """
    asked = trainer.get("precision")
    if asked != "auto":
        return asked
    if str(trainer.get("devices", 1)) not in ("1", "[0]") or trainer.get("num_nodes", 1) != 1:
        raise UserError(f"trainer.precision auto is for one process: with several, name {FULL} or {HALF}")
    if checkpoint is not None:
        return _kept(checkpoint)
    if not getattr(module, "learns", True):
        return FULL
    with quiet_trainers():
        full, half = (_step_time(precision, trainer, module, data, callbacks) for precision in (FULL, HALF))
    chosen = HALF if half < MARGIN * full else FULL
    rank_zero_info(f"precision {chosen}: a step takes {1e3 * full:.1f} ms in {FULL}, {1e3 * half:.1f} in {HALF}")
    return chosen


def _step_time(
    precision: Any,
    trainer: Mapping[str, Any],
    module: LightningModule,
    data: LightningDataModule,
    callbacks: Sequence[Any],
) -> float:
    """Return the seconds of the shortest of some steps: other work on the machine only ever adds to one."""
    acting: list[Any] = [each.again() for each in callbacks if isinstance(each, RemembersArguments)]
    watch, off = _Stopwatch(), dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    kept = {name: trainer[name] for name in ("accelerator", "accumulate_grad_batches") if name in trainer}
    Trainer(
        **kept,
        **off,  # type: ignore[arg-type]
        enable_model_summary=False,
        devices=1,
        precision=precision,
        max_steps=_WARMUP + _STEPS,
        limit_val_batches=0,
        callbacks=[*acting, watch],
    ).fit(copy.deepcopy(module), datamodule=data)
    return min(after - before for before, after in itertools.pairwise(watch.ends[_WARMUP - 1 :]))


def _kept(checkpoint: Any) -> Any:
    """Return the precision of the run that wrote a checkpoint."""
    content: Any = None if checkpoint == "last" else load_torch(checkpoint, "ckpt_path")
    try:
        return content["lightning_dd"]["run"]["trainer"]["precision"]
    except (KeyError, TypeError):
        raise UserError(
            f"trainer.precision auto: '{checkpoint}' does not say which was chosen; name {FULL} or {HALF}"
        ) from None

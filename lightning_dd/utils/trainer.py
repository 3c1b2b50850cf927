"""What a user asks of Lightning's Trainer, checked where the setting can still be named."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO, TorchCheckpointIO
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.utilities import rank_zero_warn

from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.files import load_torch, write_atomically
from lightning_dd.utils.processes import Lookout

_MOST_PROCESSES = 8  # on the cores of a small machine


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints beside their target, synced and renamed: a kill or a full disk leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint to a file of this machine; to an address, as Lightning does."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # torch would hide why a file cannot be written
        torch.save(checkpoint, buffer)
        write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def whole_checkpoints(plugins: Any) -> list[Any]:
    """Return a Trainer's plugins with :class:`WholeCheckpoints`, unless they say how checkpoints are written."""
    listed = list(plugins) if isinstance(plugins, list | tuple) else [] if plugins is None else [plugins]
    return listed if any(isinstance(plugin, CheckpointIO) for plugin in listed) else [*listed, WholeCheckpoints()]


def newest_checkpoint(folder: Path, besides: Path | None = None) -> Path | None:
    """Return the newest checkpoint of a folder that can be read whole, if any; broken ones are passed over."""
    there = [path for path in folder.glob("*.ckpt") if path.is_file() and path != besides]
    for path in sorted(there, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if isinstance(load_torch(path, "checkpoint"), dict):
                return path
        except UserError as error:
            rank_zero_warn(f"passed over: {error}")
    return None


def make_trainer(make: Callable[..., Trainer] = Trainer, **settings: Any) -> Trainer:
    """Return a Trainer of these settings; several processes look out for each other.

    Raises:
        UserError: Lightning refuses them, or there are far more processes than cores.
    """
    try:
        trainer = make(**settings)
    except UserError:
        raise
    except Exception as error:  # Lightning and what it asks raise many kinds for a wrong setting
        said = " ".join(str(error).split())
        if "No supported" in said:  # Lightning's word for a kind of device that it knows and this machine lacks
            asked = settings.get("accelerator") or settings.get("config", {}).get("accelerator")
            said = f"accelerator '{asked}': this machine has none; leave it out, or say cpu"
        raise UserError(f"trainer: {said}") from error
    most = max(_MOST_PROCESSES, os.cpu_count() or 1)
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > most:
        raise UserError(f"trainer.devices must be 1 to {most} on this machine's CPU, got {trainer.num_devices}")
    clip: Any = trainer.gradient_clip_val
    every: Any = trainer.log_every_n_steps  # type: ignore[attr-defined]
    check_range("at least 0", "trainer.", gradient_clip_val=clip, log_every_n_steps=every)
    each: dict[str, float | None] = {"accumulate_grad_batches": trainer.accumulate_grad_batches}
    each["check_val_every_n_epoch"] = trainer.check_val_every_n_epoch
    each["max_epochs"] = None if trainer.max_epochs == -1 else trainer.max_epochs
    check_range("at least 1", "trainer.", **each)
    if trainer.min_steps is not None and -1 < trainer.max_steps < trainer.min_steps:
        raise UserError(
            f"trainer.min_steps must be at most trainer.max_steps, {trainer.max_steps}, got {trainer.min_steps}"
        )
    check_range("positive", "trainer.", limit_train_batches=trainer.limit_train_batches)
    if trainer.world_size > 1:
        trainer.callbacks.append(Lookout())  # type: ignore[attr-defined]
    return trainer


def steps_to_log(trainer: Trainer) -> int:
    """Return the steps until the Trainer logs again; 0 where it logs this one."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (every - 1 - trainer.global_step) % max(1, every)


def check_length(max_steps: int, val_check_interval: Any) -> None:
    """Refuse a run that does nothing, and say of one that is never validated that it writes no ``best`` set.

    Args:
        max_steps: -1 for no end.
        val_check_interval: outer steps, or a share of the run; a time, as Lightning takes it, passes.

    Raises:
        UserError: one of them is out of range.
    """
    if max_steps < -1 or max_steps == 0:
        raise UserError(f"trainer.max_steps must be at least 1 (or -1 for no end), got {max_steps}")
    if not isinstance(val_check_interval, int | float):
        return
    accepted = "in [0, 1]" if isinstance(val_check_interval, float) else "at least 1"
    check_range(accepted, "trainer.", val_check_interval=val_check_interval)
    if 0 < max_steps < val_check_interval:
        rank_zero_warn(
            f"trainer.val_check_interval={val_check_interval} is beyond the run's {max_steps} steps: nothing is "
            "validated, and no best set is written"
        )


def check_checkpoint(path: Any) -> None:
    """Refuse a checkpoint that is no file of this machine or holds more than data: Lightning unpickles what it fetches.

    Where it cannot be read, the newest one beside it that can is named.

    Args:
        path: a file, or ``last`` for the newest of the run's folder; ``None`` starts anew.

    Raises:
        UserError: it is anything else.
    """
    if path is None or path == "last":
        return
    if "://" in str(path):
        raise UserError(f"ckpt_path '{path}' must be a file of this machine, or last: fetch it first")
    try:
        if not isinstance(load_torch(path, "ckpt_path"), dict):
            raise UserError(f"ckpt_path '{path}': not a checkpoint")
    except UserError as error:
        other = newest_checkpoint(Path(path).parent, besides=Path(path))
        raise UserError(f"{error}" + (f"; the newest whole one beside it is '{other}'" if other else "")) from None

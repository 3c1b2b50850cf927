"""Where a run writes its files."""

from pathlib import Path

from pytorch_lightning import Trainer


def run_folder(trainer: Trainer, dirpath: str | None = None) -> Path:
    """Return ``dirpath``, or the logger's folder, or the Trainer's root folder without a logger."""
    return Path(dirpath or trainer.log_dir or trainer.default_root_dir)

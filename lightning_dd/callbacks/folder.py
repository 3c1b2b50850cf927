"""Where a run writes its files."""

from pathlib import Path

from pytorch_lightning import Trainer


def run_folder(trainer: Trainer, dirpath: str | None = None) -> Path:
    """Return ``dirpath``, or the logger's folder, or the Trainer's root folder without a logger.

    Every rank must call this at the same time: the Trainer broadcasts its log folder.
    """
    log_dir = trainer.log_dir
    return Path(dirpath or log_dir or trainer.default_root_dir)

"""Where the two stages meet: the distilled-set file and its data module."""

from lightning_dd.distilled.datamodule import DistilledData
from lightning_dd.distilled.set import DistilledSet

__all__ = ["DistilledData", "DistilledSet"]

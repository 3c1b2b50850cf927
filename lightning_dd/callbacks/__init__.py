"""Lightning callbacks: the clock of the inner steps, the distilled-set file, pictures, and the speed."""

from lightning_dd.callbacks.metadd import MetaDD
from lightning_dd.callbacks.pictures import MetaFeatureImages, SyntheticImages
from lightning_dd.callbacks.run import DistillationProgress, ExportDistilledSet
from lightning_dd.distillers.base import OuterTerm
from lightning_dd.distillers.pooled import PoolAlternation

__all__ = [
    "DistillationProgress",
    "ExportDistilledSet",
    "MetaDD",
    "MetaFeatureImages",
    "OuterTerm",
    "PoolAlternation",
    "SyntheticImages",
]

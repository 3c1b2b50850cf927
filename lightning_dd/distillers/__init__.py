"""Distillers: what an outer step minimises. A new method is one subclass of :class:`Distiller`."""

from lightning_dd.distillers.base import Distiller
from lightning_dd.distillers.coresets import Herding, KCenter, Random
from lightning_dd.distillers.frepo import FRePo
from lightning_dd.distillers.pooled import PoolDistiller

__all__ = ["Distiller", "FRePo", "Herding", "KCenter", "PoolDistiller", "Random"]

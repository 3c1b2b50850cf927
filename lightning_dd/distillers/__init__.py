"""Distillers: what an outer step minimises. A new method is one subclass of :class:`Distiller`."""

from lightning_dd.distillers.base import Distiller
from lightning_dd.distillers.frepo import FRePo

__all__ = ["Distiller", "FRePo"]

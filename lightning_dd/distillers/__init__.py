"""Distillers: what an outer step minimises. A new method is one subclass of :class:`Distiller`."""

from lightning_dd.distillers.base import Distiller, Probe
from lightning_dd.distillers.dc import DC, DSA
from lightning_dd.distillers.dm import DM
from lightning_dd.distillers.frepo import FRePo
from lightning_dd.distillers.mtt import MTT
from lightning_dd.distillers.pooled import PoolDistiller
from lightning_dd.distillers.rded import RDED
from lightning_dd.distillers.selection import Herding, KCenter, Random
from lightning_dd.distillers.sre2l import SRe2L
from lightning_dd.distillers.teacher import TeacherDistiller

__all__ = [
    "DC",
    "DM",
    "DSA",
    "MTT",
    "RDED",
    "Distiller",
    "FRePo",
    "Herding",
    "KCenter",
    "PoolDistiller",
    "Probe",
    "Random",
    "SRe2L",
    "TeacherDistiller",
]

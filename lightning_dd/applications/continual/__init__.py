"""Class-incremental learning with distilled sets as the memory."""

from lightning_dd.applications.continual.plan import Plan
from lightning_dd.applications.continual.run import run_continual

__all__ = ["Plan", "run_continual"]

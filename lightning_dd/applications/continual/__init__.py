"""Class-incremental learning with distilled sets as the memory."""

from lightning_dd.applications.continual.plan import Method, Plan, parse_methods
from lightning_dd.applications.continual.run import run_continual
from lightning_dd.distilled.union import union

__all__ = ["Method", "Plan", "parse_methods", "run_continual", "union"]

"""Class-incremental learning with distilled sets as the memory."""

from lightning_dd.continual.plan import Method, Plan, parse_methods
from lightning_dd.continual.run import run_continual
from lightning_dd.continual.union import union

__all__ = ["Method", "Plan", "parse_methods", "run_continual", "union"]

"""Students trained on a distilled set, and the table made of them."""

from lightning_dd.evaluators.data import DistilledData
from lightning_dd.evaluators.student import Student

__all__ = ["DistilledData", "Student"]

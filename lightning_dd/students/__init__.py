"""Networks trained on a distilled set."""

from lightning_dd.students.student import Student

__all__ = ["Student"]

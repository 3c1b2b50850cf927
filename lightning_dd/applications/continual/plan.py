"""What a class-incremental experiment consists of: class orders and steps. Plain values, checked early."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_dd.data.registry import DataChoice
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError

JOINT = "joint"
"""Name of the upper line: a student trained on all real images of the classes seen so far."""


@dataclass(frozen=True)
class Plan:
    """Class-incremental learning with a memory of ``ipc`` images per class (FRePo's application, Zhou et al. 2022).

    Args:
        data: the data set.
        steps: equal parts the classes come in.
        ipc: images kept of every class seen.
        orders: number of class orders; order s is :func:`class_order` of seed s.
        architectures: of the students, names of the factory.
        students: students per architecture, step, order and method.
        recipe: how they are trained on the memory.
        joint: how they are trained on all real images of the classes seen; ``None`` leaves the upper line out.
        accelerator: Lightning's Trainer argument for distillers (``auto`` leaves them what their configuration says);
            students take a GPU where there is one, unless it is ``cpu``.

    Raises:
        UserError: a number is out of range, or no architecture is given.
    """

    data: DataChoice
    steps: int
    ipc: int
    orders: int
    architectures: tuple[str, ...]
    students: int = 1
    recipe: Recipe = Recipe()  # noqa: RUF009  (frozen)
    joint: Recipe | None = None
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        self.data.as_source()  # refuses data without a name
        for name in ("steps", "ipc", "orders", "students"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.architectures:
            raise UserError("architectures: name at least one")


def class_order(num_classes: int, seed: int) -> list[int]:
    """Return the order in which classes arrive: numpy's legacy ``RandomState(seed).permutation``.

    These are the orders of FRePo's and DM's published code, the same on every machine and version of numpy.

    Example:
        >>> class_order(10, 0)
        [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    """
    return [int(label) for label in np.random.RandomState(seed).permutation(num_classes)]


def split_classes(order: Sequence[int], steps: int) -> list[list[int]]:
    """Cut a class order into ``steps`` parts of as many classes each.

    Raises:
        UserError: the classes cannot be divided so, or a part would hold fewer than 2.

    Example:
        >>> split_classes([3, 1, 0, 2], 2)
        [[3, 1], [0, 2]]
    """
    count = len(order)
    fitting = [number for number in range(1, count // 2 + 1) if count % number == 0]
    if steps not in fitting:
        raise UserError(
            f"steps must divide the {count} classes into parts of at least 2 classes: "
            f"{', '.join(map(str, fitting))}; got {steps}"
        )
    size = count // steps
    return [list(order[start : start + size]) for start in range(0, count, size)]

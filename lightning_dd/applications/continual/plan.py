"""What a class-incremental experiment consists of: class orders, steps, methods. Plain values, checked early."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError

JOINT = "joint"
"""Name of the upper line: a student trained on all real images of the classes seen so far."""


@dataclass(frozen=True)
class Method:
    """A way to fill the memory: a distiller's configuration."""

    name: str
    configs: tuple[str, ...]
    """Files that ``lightning-dd fit --config`` takes, the later layered over the earlier."""
    options: tuple[str, ...] = ()
    """Further options of ``fit``, as ``--trainer.max_steps=400``."""


@dataclass(frozen=True)
class Plan:
    """Class-incremental learning with a memory of ``ipc`` images per class (FRePo's application, Zhou et al. 2022).

    Args:
        data: class name of the data set.
        data_args: its arguments other than ``root``.
        root: its folder on this machine.
        steps: equal parts the classes come in.
        ipc: images kept of every class seen.
        orders: number of class orders; order s is :func:`class_order` of seed s.
        architectures: of the students, names of the factory.
        students: students per architecture, step, order and method.
        recipe: how they are trained on the memory.
        joint: how they are trained on all real images of the classes seen; ``None`` leaves the upper line out.
        accelerator: Lightning's Trainer argument; ``auto`` leaves distillers what their configuration says.

    Raises:
        UserError: a number is out of range, or no architecture is given.
    """

    data: str
    steps: int
    ipc: int
    orders: int
    architectures: tuple[str, ...]
    data_args: dict[str, Any] = field(default_factory=dict)
    root: str | None = None
    students: int = 1
    recipe: Recipe = Recipe()  # noqa: RUF009  (frozen)
    joint: Recipe | None = None
    accelerator: str = "auto"

    def __post_init__(self) -> None:
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


def parse_methods(methods: Mapping[str, str | Sequence[str]]) -> list[Method]:
    """Sort every method's words into configuration files and options of ``fit`` (those that begin with ``--``).

    Raises:
        UserError: there is no method, a name is unusable, or a method names no file or one that is missing.

    Example:
        >>> parse_methods({"frepo": ["--trainer.max_steps=400"]})
        Traceback (most recent call last):
        ...
        lightning_dd.utils.errors.UserError: methods.frepo must name at least one configuration file, got no file
    """
    if not methods:
        raise UserError("methods: name at least one, as name: [file.yaml, --option=value]")
    found = []
    for name, words in methods.items():
        listed = [words] if isinstance(words, str) else list(words)
        options = tuple(word for word in listed if word.startswith("--"))
        configs = tuple(word for word in listed if not word.startswith("--"))
        if not re.fullmatch(r"[\w-]+", name) or name == JOINT:
            raise UserError(f"methods: a name is letters, digits, _ and -, and not '{JOINT}', got '{name}'")
        if not configs:
            raise UserError(f"methods.{name} must name at least one configuration file, got no file")
        for path in configs:
            if not Path(path).is_file():
                raise UserError(f"methods.{name}: configuration '{path}': no such file")
        found.append(Method(name, configs, options))
    return found

"""Real data from a name and arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_dd.data.base import RealData
from lightning_dd.utils.arguments import find_class
from lightning_dd.utils.errors import UserError


@dataclass(frozen=True)
class DataChoice:
    """Real data as a user names it. Everything left out is taken from where a distilled set says it came from.

    Args:
        name: class name of a data set, or the class path of any other :class:`~lightning_dd.data.RealData`.
        arguments: its arguments other than ``root``.
        root: its folder on this machine.
    """

    name: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None


def build_data(name: str, arguments: Mapping[str, Any] | None = None, root: str | None = None) -> RealData:
    """Build real data from a class name or path, which the user wrote.

    Args:
        name: as ``MNIST5k``, or ``my_package.MyData``.
        arguments: of the constructor, other than ``root``.
        root: folder of the data; ``None`` is its default.

    Raises:
        UserError: there is no such data set, or the arguments do not fit it.
    """
    cls: type[RealData] = find_class(name, RealData, "data set")  # type: ignore[type-abstract]
    place: dict[str, Any] = {} if root is None else {"root": root}
    try:
        return cls(**{**(arguments or {}), **place})
    except TypeError as error:
        raise UserError(f"the arguments do not fit data set '{name}': {error}") from None

"""What there is to choose from, a line each."""

import inspect
from collections.abc import Iterator

from lightning_dd.utils.errors import unknown_name

KINDS = ("configs", "methods", "architectures", "protocols", "data")


def listing(what: str, pattern: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and what is said of them.

    Args:
        what: one of :data:`KINDS`.
        pattern: names must contain this.

    Raises:
        UserError: there is no such kind.
    """
    if what not in KINDS:
        raise unknown_name("list", what, KINDS)
    named = {"configs": _configs, "methods": _methods, "architectures": _architectures}
    named |= {"protocols": _protocols, "data": _data}
    return (pair for pair in named[what]() if pattern in pair[0])


def _configs() -> Iterator[tuple[str, str]]:
    from lightning_dd.configs import configurations

    for name, path in configurations().items():
        yield name, path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _methods() -> Iterator[tuple[str, str]]:
    import lightning_dd.distillers as room
    from lightning_dd.utils.arguments import subclasses

    for cls in subclasses(room.Distiller):  # type: ignore[type-abstract]
        yield cls.__name__, _first_line(cls)


def _architectures() -> Iterator[tuple[str, str]]:
    from lightning_dd.models.factory import every_architecture

    yield from every_architecture()


def _protocols() -> Iterator[tuple[str, str]]:
    from lightning_dd.students.recipe import PROTOCOLS

    for name, recipe in PROTOCOLS.items():
        length = f"{recipe.epochs} epochs" if recipe.epochs else "steps by the number of images"
        yield name, f"{recipe.optimizer}, lr {recipe.lr:g}, {length}, batch {recipe.batch_size}, {recipe.schedule}"


def _data() -> Iterator[tuple[str, str]]:
    from lightning_dd.data import DATA_SETS

    for name, cls in DATA_SETS.items():
        yield name, _first_line(cls)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]

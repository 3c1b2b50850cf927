"""What there is, by kind, for ``lightning-dd list``. Only what is asked for is imported."""

import inspect
from collections.abc import Iterator

from lightning_dd.utils.errors import unknown_name

KINDS = {
    "configs": "configurations that fit and other verbs take",
    "cells": "cells of papers' tables, each with its command",
    "methods": "distillers",
    "architectures": "networks by name, ours, timm's and torchvision's",
    "protocols": "published recipes of students",
    "data": "data sets",
    "sets": "distilled sets that come with the package",
}


def listed(what: str) -> Iterator[tuple[str, str]]:
    """Yield the names of a kind, and what is said of each; the kinds themselves where none is asked for.

    Raises:
        UserError: there is no such kind.
    """
    if not what:
        yield from KINDS.items()
    elif what == "configs":
        from lightning_dd.parsing import configurations

        for name, path in configurations().items():
            yield name, path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    elif what == "cells":
        from lightning_dd.cells import cells

        for cell in cells():
            yield cell.name, f"{cell.command}  # {cell.accuracy} % in {cell.source}; ours: {cell.ours}"
    elif what == "architectures":
        from lightning_dd.models.factory import every_architecture

        yield from every_architecture()
    elif what == "protocols":
        from lightning_dd.students.recipe import PROTOCOLS

        for name, recipe in PROTOCOLS.items():
            length = f"{recipe.epochs} epochs" if recipe.epochs else "steps by the number of images"
            batch = recipe.batch_size or "by ipc and classes"
            yield name, f"{recipe.optimizer}, lr {recipe.lr:g}, {length}, batch {batch}, {recipe.schedule}"
    elif what == "sets":
        from lightning_dd.distilled.hub import builtin_sets
        from lightning_dd.distilled.set import DistilledSet

        yield from ((name, repr(DistilledSet.load(path))) for name, path in builtin_sets().items())
    elif what in ("methods", "data"):
        from lightning_dd import data, distillers
        from lightning_dd.utils.arguments import subclasses

        methods = subclasses(distillers.Distiller)  # type: ignore[type-abstract]
        for cls in methods if what == "methods" else data.DATA_SETS.values():
            yield cls.__name__, (inspect.getdoc(cls) or "").partition("\n")[0].replace("``", "")
    else:
        raise unknown_name("list", what, KINDS)

"""Settings: objects that know their own, what a file says of them, and classes found by name or by path."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, is_dataclass
from typing import Any, Self, TypeVar

from lightning_dd.utils.errors import UserError, unknown_name

Kind = TypeVar("Kind")
_OURS = "lightning_dd."
_MAY_IMPORT = ContextVar("_MAY_IMPORT", default=True)


class RemembersArguments:
    """Mixin: the arguments of the constructor are kept in :attr:`init_args`, so that a file can say how to make it.

    Example:
        >>> class Shape(RemembersArguments):
        ...     def __init__(self, sides: int, **more: float) -> None: ...
        >>> Shape(3, area=1.5).init_args
        {'sides': 3, 'area': 1.5}
    """

    init_args: dict[str, Any]
    """Those that were given, by name."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        made = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(made, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        for parameter in bound.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        object.__setattr__(made, "init_args", given)  # before a module's own constructor has run
        return made

    def again(self) -> Self:
        """Return a new object of the same arguments, which shares no state with this one."""
        return type(self)(**self.init_args)

    def recipe(self) -> dict[str, Any]:
        """Return ``{"class_path": ..., "init_args": ...}``, which makes an equal object."""
        return {"class_path": class_path(type(self)), "init_args": dict(self.init_args)}


def class_path(cls: type) -> str:
    """Return where a class is defined: ``package.module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def subclasses(base: type[Kind]) -> Iterator[type[Kind]]:
    """Yield every class below ``base`` that has been imported, abstract and private ones left out."""
    for child in base.__subclasses__():
        if not inspect.isabstract(child) and not child.__name__.startswith("_"):
            yield child
        yield from subclasses(child)


def known_class(name: str, base: type[Kind], what: str) -> type[Kind]:
    """Return the imported subclass of ``base`` with this name or path, as a name from a file is looked up.

    Raises:
        UserError: there is none; nothing is imported for it.
    """
    found = {cls.__name__: cls for cls in subclasses(base)} | {class_path(cls): cls for cls in subclasses(base)}
    if name not in found and name.startswith(_OURS):
        name = name.rpartition(".")[2]  # it has moved since
    if name not in found:
        raise unknown_name(what, name, (cls.__name__ for cls in subclasses(base)))
    return found[name]


def plain_values(value: Any) -> Any:
    """Return settings as plain values that a checkpoint can hold and a file can say.

    Objects that remember their arguments become ``{"class_path": ..., "init_args": ...}``, dataclasses dictionaries,
    tuples lists.

    Example:
        >>> plain_values({"sizes": (1, 2)})
        {'sizes': [1, 2]}
    """
    if isinstance(value, RemembersArguments):
        return plain_values(value.recipe())
    if is_dataclass(value) and not isinstance(value, type):
        return plain_values(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return value


def revive(plain: Any) -> Any:
    """Make the objects that plain settings name by ``class_path`` and ``init_args``, of classes that are imported."""
    if not isinstance(plain, dict):
        return plain
    if "class_path" not in plain:
        return {name: revive(value) for name, value in plain.items()}
    cls = known_class(plain["class_path"], RemembersArguments, "class")
    return cls(**revive(plain.get("init_args") or {}))


def find_class(name: str, base: type[Kind], what: str) -> type[Kind]:
    """Return a class by name, or by a path that is imported now: see :func:`find_object`.

    Raises:
        UserError: there is no such class, or it is no subclass of ``base``.
    """
    if "." not in name or name.startswith(_OURS):
        return known_class(name, base, what)
    found = find_object(name, what)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UserError(f"{what} '{name}' is no subclass of {class_path(base)}")
    return found


def find_object(path: str, what: str) -> Any:
    """Import what a path ``package.module.name`` names. For what the user wrote, never for what a file says.

    Raises:
        UserError: it cannot be imported, or must not be: see :func:`nothing_imported`.
    """
    module, _, attribute = path.rpartition(".")
    if not _MAY_IMPORT.get() and module not in sys.modules:
        raise UserError(f"{what} '{path}' has not been imported, and nothing is imported for a file")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{what} '{path}' cannot be imported: {error}") from None


def user_asked() -> bool:
    """Return whether settings come from the user, who may run programs: false within :func:`nothing_imported`."""
    return _MAY_IMPORT.get()


@contextmanager
def nothing_imported() -> Iterator[None]:
    """Within the block, names come from a file: they are looked up among what has been imported."""
    token = _MAY_IMPORT.set(False)
    try:
        yield
    finally:
        _MAY_IMPORT.reset(token)


def without_places(value: Any) -> Any:
    """Return plain settings without what names a place of this machine or a host: such a path is left as its name.

    Example:
        >>> without_places({"root": "photos", "files": ["/home/me/a.pt", "conv:width=32"]})
        {'files': ['a.pt', 'conv:width=32']}
    """
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items() if key not in ("root", "dirpath")}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and re.match(r"[/~\\]|\.\./|[A-Za-z]:\\|[a-z]+://", value):
        return re.split(r"[/\\]", value.rstrip("/"))[-1]
    return value


def public_settings(hparams: Any) -> dict[str, Any]:
    """Return hyper-parameters without the entries Lightning's command line adds for itself."""
    return {name: value for name, value in dict(hparams).items() if not name.startswith("_")}


def dotted(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings inside settings by dotted name, as ``model.lr``."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{above}{name}.")
        else:
            yield above + name, value


def refuse_other(what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to continue a checkpoint of another configuration or of other data, naming the first difference."""
    for name, there in saved.items():  # a setting that came later has a default that changes nothing
        now = here.get(name)
        if isinstance(there, Mapping) and isinstance(now, Mapping):  # nor does one of an object's
            now = {key: value for key, value in now.items() if key in there}
        if there != now:
            raise UserError(f"the checkpoint is of {what}: {name} is {there!r} there and {here.get(name)!r} here")

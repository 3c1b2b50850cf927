"""Argument errors in one line instead of a page of usage."""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lightning_dd.utils.errors import UserError, unknown_name

KnownClasses = Callable[[str], dict[str, type]]
"""From a key (``model``, ``data``, ``trainer.callbacks``) to the classes it accepts, by name."""


class OneLineErrors:
    """Mixin for a jsonargparse parser: say the mistake in one line, with what is accepted, and exit with status 2.

    Attributes:
        arguments: the command line being parsed, to find out which class an unknown option was meant for.
        known_classes: tells which classes a key accepts.
    """

    arguments: Sequence[str] = ()
    known_classes: KnownClasses = staticmethod(lambda key: {})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # a mistyped option must not become another one
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line that names the mistake."""
        print(f"lightning-dd: error: {explain(message, self.arguments, self.known_classes)}", file=sys.stderr)
        sys.exit(2)


def explain(message: str, arguments: Sequence[str] = (), known_classes: KnownClasses = lambda key: {}) -> str:
    '''Turn a jsonargparse message of many lines into one line.

    Example:
        >>> explain("""Parser key "ipc": Expected a <class 'int'>. Got value: two""")
        'ipc: expected int, got two'
    '''
    where = re.search(r'[Pp]arser key "([^"]+)"', message)
    key = where[1] if where else ""
    if found := re.search(
        r"Expected a dot import path string: (\S+)|No module named '?([\w.]+)|undefined: (\S+)", message
    ):
        name = next(group for group in found.groups() if group)
        return str(unknown_name(f"class for {key or 'this setting'}", name, known_classes(key)))
    if found := re.search(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", message):
        return _unknown_option(found[1].split(".")[-1], arguments, known_classes)
    if found := re.search(r"[Uu]nrecognized arguments: (.+)", message):
        return _unrecognised(found[1], known_classes)
    if found := re.search(r"Expected an? (?:<class '(\w+)'>|(.+?))\. Got value: (.+)", message):
        return f"{key}: expected {found[1] or found[2]}, got {found[3]}"
    if found := re.search(r"Errors:\s+- (.+)", message):
        return found[1]
    return " ".join(message.split())


def user_error_in(error: BaseException) -> UserError | None:
    """Return the user's error that a library wrapped in its own, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def options_of(cls: type) -> list[str]:
    """List the constructor arguments of a class, those of its bases included where it passes ``**kwargs`` on."""
    names: list[str] = []
    for base in cls.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        names += [
            name for name, item in parameters.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
        ]
        if parameters and not any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
            break
    return [name for name in dict.fromkeys(names) if name != "self"]


def _unknown_option(option: str, arguments: Sequence[str], known_classes: KnownClasses) -> str:
    chosen = _chosen_classes(arguments)
    owners = [key for key, settings in chosen.items() if option in settings["options"]] or list(chosen)
    for key in owners:
        cls = known_classes(key).get(chosen[key]["class"].rpartition(".")[2])
        if cls is not None:
            return str(unknown_name(f"option of {cls.__name__}", option, options_of(cls)))
    return f"unknown option '{option}'"


def _unrecognised(text: str, known_classes: KnownClasses) -> str:
    option = text.split()[0].split("=")[0]
    key, _, name = option.lstrip("-").rpartition(".")
    owner = known_classes(key).get(key.capitalize())
    if owner is not None:
        return str(unknown_name(f"option of {key}", name, options_of(owner)))
    return f"unknown option '{option}'; the verb's --help lists the known ones"


def _chosen_classes(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read off the command line and its YAML files which class each of ``model`` and ``data`` is given, and options."""
    chosen: dict[str, dict[str, Any]] = {key: {"class": "", "options": set()} for key in ("model", "data")}
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word in ("--config", "-c") and Path(value).is_file():
            content = yaml.safe_load(Path(value).read_text()) or {}
            for key in chosen:
                settings = content.get(key) or {}
                chosen[key]["class"] = settings.get("class_path", chosen[key]["class"])
                chosen[key]["options"] |= set(settings.get("init_args") or {})
        for key in chosen:
            if word in (f"--{key}", f"--{key}.class_path"):
                chosen[key]["class"] = value
            elif word.startswith(f"--{key}."):
                chosen[key]["options"].add(word.rpartition(".")[2])
    return chosen

"""The words of a command line: configurations by name, the options of our own verbs, and a mistake in one line."""

import errno
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from lightning_dd.utils.errors import UserError, of_system, printable, unknown_name

FOLDER = Path(__file__).parent / "configs"
"""The configuration files that come with the package."""
_MOST_SETTINGS = 100_000
_EXPECTED = re.compile(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.+)\])")

KnownClasses = Callable[[str], dict[str, type]]
"""From a key (``model``, ``data``, ``trainer.callbacks``) to the classes it accepts, by name."""


def configurations() -> dict[str, Path]:
    """Return the package's configuration files by name: ``mnist5k/frepo``."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def find_configuration(name: str) -> Path:
    """Return a configuration file: a path as it is, else the one of that name that comes with the package.

    Args:
        name: ``my.yaml``, ``mnist5k/frepo``, ``mnist5k/frepo.yaml`` or ``configs/mnist5k/frepo.yaml``.

    Raises:
        UserError: there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    known = configurations()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short not in known:
        raise unknown_name("configuration", name, known)
    return known[short]


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Return a command line with every configuration as ``--config=PATH``."""
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name = word.partition("=")[2] if word.startswith("--config=") else None
        if word in ("--config", "-c"):
            name = next(rest, None)
        words.append(word if name is None else f"--config={_checked(find_configuration(name))}")
    return words


def _checked(path: Path) -> Path:
    """Refuse a configuration that is not YAML, holds no settings by name, or more than one could have written."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"configuration '{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | NoneType):
        raise UserError(f"configuration '{path}' must hold settings by name, found a {type(content).__name__}")
    waiting, count = [content], 0
    while waiting and count <= _MOST_SETTINGS:  # aliases stand for what they name each time
        item = waiting.pop()
        count += 1
        waiting += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    if waiting:
        raise UserError(f"configuration '{path}' stands for more than {_MOST_SETTINGS} settings: use fewer aliases")
    return path


def run_name(arguments: Sequence[str]) -> str:
    """Return what a run of :func:`with_paths` is called: after its first configuration, as ``mnist5k-frepo``."""
    paths = [Path(word.removeprefix("--config=")) for word in arguments if word.startswith("--config=")]
    if not paths:
        return "distil"
    file, folder = paths[0].resolve(), FOLDER.resolve()
    parts = file.relative_to(folder).with_suffix("").parts if folder in file.parents else (file.stem,)
    return "-".join(parts).replace("_", "-")


class OneLineErrors(ArgumentParser):
    """A jsonargparse parser that says a mistake in one line, with what is accepted, and exits with status 2.

    jsonargparse makes another parser of the same kind for every class that a setting names, and that one finds the
    mistakes in the class's options: so every parser knows whose options it has.

    Attributes:
        known_classes: tells which classes a key accepts.
        described: the class whose options these are.
    """

    known_classes: KnownClasses = staticmethod(lambda key: {})
    described: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # a mistyped option must not become another one
        super().__init__(*args, **kwargs)

    def add_class_arguments(self, class_type: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Add the options of a class, and remember it if all options are its own."""
        if nested_key is None:
            self.described = class_type.__name__
        return super().add_class_arguments(class_type, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line that names the mistake."""
        parser = getattr(ex, "subcommand_parser", None) or self
        unknown = re.search(r"(?:[Oo]ption '|arguments: -*)([\w.]+)", message)
        text = str(parser.unknown_option(unknown[1])) if unknown else explain(message, self.known_classes)
        if any(text.startswith(f"{action.dest}: ") for action in self._actions if "." not in action.dest):
            text = f"{f'{self.described}.' if self.described else '--'}{text}"
        print(f"lightning-dd: error: {printable(text)}", file=sys.stderr)
        sys.exit(2)

    def unknown_option(self, name: str) -> UserError:
        """Return the error for an option that is none of this parser's."""
        group, dot, option = name.rpartition(".")
        named = [action.dest for action in self._actions if action.option_strings]
        inside = [known.removeprefix(group + dot) for known in named if known.startswith(group + dot)]
        known = [known for known in inside if "." not in known and known not in ("help", "print_shtab")]
        if owner := group or self.described:
            return unknown_name(f"option of {owner}", option, known)
        return unknown_name("option", f"--{option}", [f"--{name}" for name in known])


def explain(message: str, known_classes: KnownClasses = lambda key: {}) -> str:
    '''Turn a jsonargparse message of many lines into one line; a message of another form is only shortened.

    Example:
        >>> explain("""Parser key "ipc": Expected a <class 'int'>. Got value: two""")
        'ipc: expected int, got two'
    '''
    where = re.search(r'[Pp]arser key "([^"]+)"', message)
    key = where[1] if where else ""
    if name := re.search(r"(?:Expected a dot import path string: |No module named '?|undefined: )([^\s']+)", message):
        return str(unknown_name(f"class for {key or 'this setting'}", name[1], known_classes(key)))
    if value := re.search(r"Expected an? (?:<class '(\w+)'>|(.+?))\. Got value: (.+)", message):
        return f"{key}: expected {value[1] or value[2]}, got {value[3]}"
    errors, given = re.findall(r"^\s+- (.+)", message, re.M), re.search(r"Given value: (.+)", message)
    if given and (base := re.search(r"subclass of (\w+)", message)):
        return f"{key}: '{given[1]}' is no subclass of {base[1]}"
    kinds = [found[1] or found[2] for error in errors if (found := _EXPECTED.fullmatch(error))]
    if given and kinds and len(kinds) == len(errors):
        return f"{key}: expected {', '.join(kind for kind in kinds if kind != 'NoneType')}, got {given[1]}"
    first = re.search(r"Errors:\s+- (.+)", message)
    return first[1] if first else " ".join(message.split())


_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def user_error_in(error: BaseException) -> UserError | None:
    """Return the user's error that a library wrapped in its own, or what the disk refused it, if there is one."""
    refused: OSError | None = error if isinstance(error, OSError) else None
    found: BaseException | None = error
    seen = set[int]()
    while found is not None and id(found) not in seen:  # TensorBoard raises one error again and again: a circle
        seen.add(id(found))
        if isinstance(found, UserError):
            return found
        if isinstance(found, OSError) and found.errno in _OF_DISKS:
            refused = found
        found = found.__cause__ or found.__context__
    return None if refused is None else UserError(of_system(refused))


class Verb:
    """A verb: a dataclass whose fields are its options, and the first line of whose docstring is its help."""

    def run(self) -> None:
        """Do it."""
        raise NotImplementedError

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring, as the list of verbs shows it."""
        line = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
        return line[0].lower() + line[1:]


def option(text: str, default: Any = MISSING, **kind: bool) -> Any:
    """Return a field that is an option of a verb, with its help; without a default it is required.

    Args:
        text: the help.
        default: a value, or a function that makes one.
        kind: ``words=True`` takes several words, ``positional=True`` needs no ``--name``, ``flag=True`` is true where
            it is named.
    """
    fallback: dict[str, Any] = {"default_factory" if callable(default) else "default": default}
    return field(metadata={"help": text, **kind}, **fallback)


def parse_verb(name: str, verb: type[Any], arguments: Sequence[str]) -> Any:
    """Return a verb with the options of a command line; after a mistake, say it in one line and exit with status 2."""
    parser = OneLineErrors(prog=f"lightning-dd {name}", description=(verb.__doc__ or "").partition("\n")[0])
    own_config = any(item.name == "config" for item in fields(verb))
    if not own_config:
        parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with any of these options")
    hints = get_type_hints(verb)
    for item in fields(verb):
        words, required = item.metadata.get("words", False), item.default is MISSING and item.default_factory is MISSING
        settings: dict[str, Any] = {"type": str if words else hints[item.name], "help": item.metadata["help"]}
        if words:
            settings["nargs"] = "+"
        if not required:
            settings["default"] = item.default_factory() if item.default is MISSING else item.default  # type: ignore[operator]
        if item.metadata.get("flag", False):
            parser.add_argument(f"--{item.name}", action="store_true", help=item.metadata["help"])
        elif item.metadata.get("positional", False):
            parser.add_argument(item.name, **(settings if required or words else settings | {"nargs": "?"}))
        else:
            parser.add_argument(f"--{item.name}", required=required, **settings)
    parsed = parser.instantiate(parser.parse_args(arguments if own_config else with_paths(arguments))).as_dict()
    if not own_config:
        parsed.pop("config", None)
    return verb(**parsed)

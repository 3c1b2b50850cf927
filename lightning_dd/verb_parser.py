"""From a command line to one of our own verbs."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from lightning_dd.configs import found
from lightning_dd.parsing import OneLineErrors
from lightning_dd.verbs import Verb


class VerbParser(OneLineErrors, ArgumentParser):
    """The parser of our own verbs."""


def parse_verb(name: str, verb: type[Verb], arguments: Sequence[str]) -> Verb:
    """Parse a verb's options.

    Raises:
        UserError: a configuration does not exist.
        SystemExit: the arguments could not be parsed (status 2, one line on stderr).
    """
    parser = VerbParser(prog=f"lightning-dd {name}", description=(verb.__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with any of these options")
    hints = get_type_hints(verb)
    for item in fields(verb):  # type: ignore[arg-type]
        words, required = item.metadata.get("words", False), item.default is MISSING and item.default_factory is MISSING
        settings: dict[str, Any] = {"type": str if words else hints[item.name], "help": item.metadata["help"]}
        if words:
            settings["nargs"] = "+"
        if not required:
            settings["default"] = item.default_factory() if item.default is MISSING else item.default  # type: ignore[operator]
        if item.name in getattr(verb, "positional", ()):
            parser.add_argument(item.name, **(settings if required or words else settings | {"nargs": "?"}))
        else:
            parser.add_argument(f"--{item.name}", required=required, **settings)
    parsed = parser.instantiate(parser.parse_args(found(arguments))).as_dict()
    parsed.pop("config", None)
    return verb(**parsed)

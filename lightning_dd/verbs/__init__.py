"""Our own verbs as plain typed functions: their signatures are their options."""

import inspect
from collections.abc import Callable
from typing import Any

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from lightning_dd.parsing import OneLineErrors
from lightning_dd.verbs.applications import continual, membership
from lightning_dd.verbs.evaluation import evaluate, scores
from lightning_dd.verbs.sets import convert, export


class Parser(OneLineErrors, ArgumentParser):
    """A parser that answers a mistake with one line."""


def run_verb(verb: str, arguments: list[str]) -> None:
    """Parse a verb's options and run it.

    Raises:
        UserError: something the user can mend.
        SystemExit: the arguments could not be parsed (status 2, one line on stderr).
    """
    function, lists = VERBS[verb]
    parser = Parser(prog=f"lightning-dd {verb}", description=(function.__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with any of these options")
    helps = {item.arg_name: item.description for item in docstring_parser.parse(function.__doc__ or "").params}
    for flag in lists:
        # Several words after a flag; a signature's list would have to be written as YAML.
        kind: dict[str, Any] = {"nargs": "+"} if flag in ("files", "--architectures", "--protocol") else {}
        default = inspect.signature(function).parameters[flag.lstrip("-")].default
        if flag.startswith("-"):
            words = [default] if kind and isinstance(default, str) else default
            kind |= {"required": True} if default is inspect.Parameter.empty else {"default": words}
        parser.add_argument(flag, type=str, help=helps[flag.lstrip("-")], **kind)
    parser.add_function_arguments(function, skip={flag.lstrip("-") for flag in lists}, as_group=False)
    settings = parser.instantiate(parser.parse_args(arguments)).as_dict()
    settings.pop("config", None)
    function(**settings)


VERBS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "evaluate": (evaluate, ("files", "--architectures", "--protocol")),
    "scores": (scores, ("files", "--architectures")),
    "export": (export, ("checkpoint",)),
    "convert": (convert, ()),
    "continual": (continual, ("--architectures",)),
    "membership": (membership, ()),
}
"""Each verb's function, and its arguments that are positional or take several words."""

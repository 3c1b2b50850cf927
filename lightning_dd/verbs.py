"""Our own verbs as plain typed functions: their signatures are their options."""

from collections.abc import Callable
from typing import Any

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from lightning_dd.parsing import OneLineErrors


class Parser(OneLineErrors, ArgumentParser):
    """A parser that answers a mistake with one line."""


def evaluate(
    files: list[str],
    architectures: list[str],
    output: str,
    seeds: int = 3,
    steps: int | None = None,
    lr: float = 3e-4,
    batch_size: int = 500,
    augment: str = "auto",
    ema: float = 0.0,
    root: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
) -> None:
    """Train architectures x seeds on distilled sets and on random real images; print and write one table.

    Args:
        files: distilled-set files.
        architectures: names of the factory, as ``name`` or ``name:option=value,...``.
        output: folder of results.json, results.csv, results.md, results.png and the TensorBoard logs.
        seeds: students per architecture and source.
        steps: training steps of a student; FRePo's table by the number of images if not given.
        lr: peak learning rate of a student.
        batch_size: synthetic images per step, at most all.
        augment: operations joined by ``_``, ``auto`` for FRePo's, ``none`` for none.
        ema: decay of an exponential moving average of the weights; 0 for none.
        root: folder of the real data on this machine.
        accelerator: Lightning's Trainer argument.
        devices: processes per student.
        strategy: Lightning's Trainer argument, ``ddp`` for several processes.
    """
    from lightning_dd.evaluators.evaluate import evaluate_files
    from lightning_dd.evaluators.matrix import Hardware
    from lightning_dd.recipe import Recipe

    recipe = Recipe(steps=steps, lr=lr, batch_size=batch_size, augment=augment, ema=ema)
    evaluate_files(files, architectures, output, seeds, recipe, root, Hardware(accelerator, devices, strategy))


def export(checkpoint: str, output: str, picture: str | None = None) -> None:
    """Turn a distiller's checkpoint into a distilled-set file.

    Args:
        checkpoint: a checkpoint written by ``fit``.
        output: the distilled-set file to write.
        picture: a PNG of the images to write as well.
    """
    from lightning_dd.callbacks.images import write_picture
    from lightning_dd.distillers.load import distilled_from_checkpoint

    distilled = distilled_from_checkpoint(checkpoint)
    print(f"wrote {distilled.save(output)}")
    if picture is not None:
        print(f"wrote {write_picture(distilled, picture)}")


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
        kind: dict[str, Any] = {"nargs": "+"} if flag in ("files", "--architectures") else {}
        required: dict[str, Any] = {"required": True} if flag.startswith("-") else {}
        parser.add_argument(flag, type=str, help=helps[flag.lstrip("-")], **kind, **required)
    parser.add_function_arguments(function, skip={flag.lstrip("-") for flag in lists}, as_group=False)
    settings = parser.instantiate(parser.parse_args(arguments)).as_dict()
    settings.pop("config", None)
    function(**settings)


VERBS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "evaluate": (evaluate, ("files", "--architectures")),
    "export": (export, ("checkpoint",)),
}
"""Each verb's function, and its arguments that are positional or take several words."""

"""Our own verbs as plain typed functions: their signatures are their options."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
    protocol: list[str] | str = "frepo",
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    augment: str | None = None,
    ema: float | None = None,
    root: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    workers: int = 1,
) -> None:
    """Train architectures x seeds on distilled sets and on random real images; print and write one table.

    Args:
        files: distilled-set files.
        architectures: names of the factory, as ``name`` or ``name:option=value,...``, or of groups: unseen-small,
            unseen, frepo-cross, zoo-small.
        output: folder of results.json, results.csv, results.md, results.png and the TensorBoard logs.
        seeds: students per architecture and source.
        protocol: published recipe: frepo, dc, dsa, mtt, glad, sre2l or rded; several make a matrix. The next five
            replace what it says.
        steps: training steps of a student.
        lr: peak learning rate of a student.
        batch_size: synthetic images per step, at most all.
        augment: operations joined by ``_``, ``auto`` for FRePo's, ``siamese`` for DSA's, ``none`` for none.
        ema: decay of an exponential moving average of the weights; 0 for none.
        root: folder of the real data on this machine.
        accelerator: Lightning's Trainer argument.
        devices: processes per student.
        strategy: Lightning's Trainer argument, ``ddp`` for several processes.
        workers: processes of this machine that train students side by side.
    """
    from lightning_dd.evaluators.evaluate import evaluate_files
    from lightning_dd.evaluators.matrix import Hardware
    from lightning_dd.protocols import protocol as published

    given: dict[str, Any] = {"steps": steps, "lr": lr, "batch_size": batch_size, "augment": augment, "ema": ema}
    given = {name: value for name, value in given.items() if value is not None}
    names = [protocol] if isinstance(protocol, str) else protocol
    recipes = {name: replace(published(name), **given) for name in names}
    hardware = Hardware(accelerator, devices, strategy)
    evaluate_files(files, architectures, output, seeds, recipes, root, hardware, workers)


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


def membership(
    methods: dict[str, list[str] | str],
    output: str,
    data: str,
    members: int,
    lengths: list[int],
    held_out: int = 0,
    seeds: int = 1,
    victims: int = 5,
    architecture: str = "conv:norm=none",
    lr: float = 3e-4,
    batch_size: int = 256,
    real_batch_size: int = 1024,
    augment: str = "auto",
    real_augment: str | None = None,
    attacks: list[str] | None = None,
    folds: int = 5,
    attack_rows: int = 2000,
    shadows: int = 0,
    distil_shadows: int = 0,
    val_fraction: float = 0.0,
    data_args: dict[str, Any] | None = None,
    root: str | None = None,
    accelerator: str = "auto",
    workers: int = 1,
) -> None:
    """Attack networks trained on members, on few of them and on distilled sets: who was a member?

    Args:
        methods: by name, configurations of a distiller with options of ``fit``, or distilled-set files, one a seed.
        output: folder of results.json, results.csv, results.md, results.png and all networks' answers.
        data: class name of the data set whose training split the members are drawn from.
        members: training images that are distilled, per seed.
        lengths: training steps after which a victim is attacked.
        held_out: non-members cut from the training split; 0 takes the test split.
        seeds: disjoint sets of members, each distilled with its own seed.
        victims: networks per source and seed.
        architecture: of the victims.
        lr: constant learning rate of Adam.
        batch_size: images per step, at most all.
        real_batch_size: the same for training on all members.
        augment: operations joined by ``_``, ``auto`` for FRePo's, ``none`` for none.
        real_augment: the same for training on all members; as ``augment`` if not given.
        attacks: of threshold, logistic, mlp, forest, neighbours and lira; all if not given.
        folds: cross-validation of the four learned attacks.
        attack_rows: members and non-members a learned attack is given, at most.
        shadows: LiRA's shadow models per real source and seed, 0 or an even number from 4.
        distil_shadows: LiRA's shadow models per method and seed, each with a distillation of its own; likewise.
        val_fraction: share of the members kept from training for a distiller's validation.
        data_args: arguments of the data set.
        root: folder of the data set.
        accelerator: Lightning's Trainer argument.
        workers: processes of this machine that train and attack side by side.
    """
    from lightning_dd.membership.experiment import ATTACKS, Experiment, Method
    from lightning_dd.membership.run import run_membership
    from lightning_dd.recipe import Recipe

    settings = {name: value for name, value in locals().items() if name in inspect.signature(Experiment).parameters}
    settings |= {
        "output": Path(output),
        "methods": {name: Method.parse(name, words) for name, words in methods.items()},
        "lengths": tuple(lengths),
        "recipe": Recipe(lr=lr, warmup=0, schedule="constant", batch_size=batch_size, augment=augment),
        "attacks": tuple(attacks or ATTACKS),
        "data_args": data_args or {},
    }
    run_membership(Experiment(**settings), workers)


def continual(
    methods: dict[str, list[str]],
    architectures: list[str],
    output: str,
    data: str = "MNIST5k",
    data_args: dict[str, Any] | None = None,
    root: str | None = None,
    steps: int = 5,
    ipc: int = 20,
    orders: int = 5,
    students: int = 1,
    protocol: str = "frepo",
    student_steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    augment: str | None = None,
    joint: bool = True,
    joint_steps: int = 2000,
    joint_lr: float = 1e-3,
    joint_batch_size: int = 128,
    accelerator: str = "auto",
) -> None:
    """Let classes come in steps, keep a distilled set of each, and train students from scratch after every step.

    Args:
        methods: by name, the configuration files of a distiller (the later layered over the earlier) and options of
            ``fit``, which begin with ``--``.
        architectures: of the students, names of the factory.
        output: folder of the report and of everything distilled; an interrupted experiment goes on from it.
        data: class name of the data set.
        data_args: its arguments.
        root: its folder on this machine.
        steps: equal parts the classes come in.
        ipc: images kept of every class.
        orders: class orders, drawn by the seeds 0, 1, ...
        students: students per architecture, method, order and step.
        protocol: published recipe of the students on the memory. The next four replace what it says.
        student_steps: training steps of a student.
        lr: its peak learning rate.
        batch_size: images per step, at most all.
        augment: operations joined by ``_``; ``auto``, ``siamese`` or ``none``.
        joint: also train students on all real images of the classes seen, as the upper line.
        joint_steps: their training steps.
        joint_lr: their peak learning rate.
        joint_batch_size: their images per step.
        accelerator: Lightning's Trainer argument; ``auto`` leaves distillers what their configuration says.
    """
    from lightning_dd.continual import Plan, parse_methods, run_continual
    from lightning_dd.protocols import protocol as published

    given: dict[str, Any] = {"steps": student_steps, "lr": lr, "batch_size": batch_size, "augment": augment}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = replace(published(protocol), **given)
    upper = replace(published("frepo"), steps=joint_steps, lr=joint_lr, batch_size=joint_batch_size)
    plan = Plan(
        data=data,
        data_args=data_args or {},
        root=root,
        steps=steps,
        ipc=ipc,
        orders=orders,
        architectures=tuple(architectures),
        students=students,
        recipe=recipe,
        joint=(upper if augment is None else replace(upper, augment=augment)) if joint else None,
        accelerator=accelerator,
    )
    run_continual(parse_methods(methods), plan, output)


def convert(
    layout: str,
    images: str,
    data: str,
    preprocessing: str,
    output: str,
    labels: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    experiment: int = 0,
    architecture: str | None = None,
    method: str | None = None,
    root: str | None = None,
    data_args: dict[str, Any] | None = None,
) -> None:
    """Turn a distilled set of another project into a distilled-set file that ``evaluate`` takes.

    Args:
        layout: frepo (.npz, or .pt of its PyTorch branch), dc (res_*.pt of DC, DSA and DM), mtt (images_*.pt and
            labels_*.pt of MTT and DATM), sre2l or rded (folders of images).
        images: the file, or the folder of one folder per class.
        data: class name of the data set the images stand for.
        preprocessing: the space the images are in: pixels, standardise, zca (FRePo's) or kornia-zca (MTT's, DATM's).
        output: the distilled-set file to write.
        labels: the second file of layout mtt.
        mean: channel means, as [0.49,0.48,0.45]; the project's own if not given.
        std: channel standard deviations, likewise.
        experiment: which of the sets in a file of layout dc.
        architecture: what the set was distilled with, so that tables can say ``seen``.
        method: what made the set, if not what the layout is named after.
        root: folder of the data set.
        data_args: further arguments of the data set.
    """
    from lightning_dd.data.convert import convert_set, summary

    settings = {name: value for name, value in locals().items() if name in inspect.signature(convert_set).parameters}
    distilled = convert_set(**settings)
    print(f"wrote {distilled.save(output)}: {summary(distilled)}")


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
    "export": (export, ("checkpoint",)),
    "convert": (convert, ()),
    "continual": (continual, ("--architectures",)),
    "membership": (membership, ()),
}
"""Each verb's function, and its arguments that are positional or take several words."""

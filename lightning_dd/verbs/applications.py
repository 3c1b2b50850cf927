"""Verbs that put distilled sets to use."""

import inspect
from pathlib import Path
from typing import Any


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
    from lightning_dd.applications.membership.experiment import ATTACKS, Experiment, Method
    from lightning_dd.applications.membership.run import run_membership
    from lightning_dd.students.recipe import Recipe

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
    from lightning_dd.applications.continual import Plan, parse_methods, run_continual
    from lightning_dd.students.protocols import protocol as published

    recipe = published(protocol, steps=student_steps, lr=lr, batch_size=batch_size, augment=augment)
    upper = published("frepo", steps=joint_steps, lr=joint_lr, batch_size=joint_batch_size, augment=augment)
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
        joint=upper if joint else None,
        accelerator=accelerator,
    )
    run_continual(parse_methods(methods), plan, output)

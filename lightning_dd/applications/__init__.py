"""What distilled sets are good for: a memory for classes that come in steps, and privacy under attack.

The settings of both experiments are here, as the command line shows them; importing them imports nothing heavy.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from lightning_dd.experiment import Experiment
from lightning_dd.utils.errors import UserError, check_range, unknown_name

ATTACKS = {
    "threshold": "loss threshold",
    "logistic": "logistic regression",
    "mlp": "MLP",
    "forest": "random forest",
    "neighbours": "k nearest neighbours",
    "lira": "LiRA",
}
"""Membership attacks by name, and what a table calls them."""
JOINT = "joint"
"""Name of the upper line of continual learning: students trained on all real images of the classes seen so far."""


@dataclass(frozen=True, kw_only=True)
class Membership(Experiment):
    """Attack networks trained on distilled sets: who was in the data?

    Args:
        members: training images that are distilled, per seed.
        lengths: training steps after which a victim is attacked, increasing.
        held_out: non-members cut from the training split; 0 takes the test split.
        seeds: disjoint sets of members, each distilled with its own seed.
        victims: networks per source and seed.
        architecture: of victims and shadow models.
        lr: constant learning rate of Adam.
        batch_size: images per step, at most all.
        real_batch_size: the same for training on all members.
        augment: operations joined by _, auto for FRePo's, none for none.
        real_augment: the same for training on all members; as augment if not given.
        attacks: of threshold, logistic, mlp, forest, neighbours and lira.
        folds: cross-validation of the four learned attacks.
        attack_rows: members and non-members a learned attack is given, at most.
        shadows: LiRA's shadow models per real source and seed, 0 or an even number from 4.
        distil_shadows: shadow models per method and seed, each with a distillation of its own; likewise.
        val_fraction: share of the members kept from training for a distiller's validation; these are no members then.

    Raises:
        UserError: a setting is out of range.
    """

    members: int
    lengths: list[int]
    held_out: int = 0
    seeds: int = 1
    victims: int = 5
    architecture: str = "conv:norm=none"
    lr: float = 3e-4
    batch_size: int = 256
    real_batch_size: int = 1024
    augment: str = "auto"
    real_augment: str | None = None
    attacks: list[str] = field(default_factory=lambda: list(ATTACKS))
    folds: int = 5
    attack_rows: int = 2000
    shadows: int = 0
    distil_shadows: int = 0
    val_fraction: float = 0.0

    takes_files: ClassVar = True

    def __post_init__(self) -> None:
        check_range("at least 1", seeds=self.seeds, victims=self.victims, members=self.members)
        check_range("at least 1", real_batch_size=self.real_batch_size, attack_rows=self.attack_rows)
        if not self.lengths or min(self.lengths) < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"lengths must be increasing numbers of steps from 1, got {list(self.lengths)}")
        for attack in self.attacks:
            if attack not in ATTACKS:
                raise unknown_name("attack", attack, ATTACKS)
        for name in ("shadows", "distil_shadows"):
            count = getattr(self, name)
            if count and (count < 4 or count % 2):
                raise UserError(f"{name} must be 0 or an even number from 4, got {count}")
        for name, method in self.distillers.items():
            if method.files and len(method.files) != self.seeds:
                raise UserError(f"methods.{name}: {len(method.files)} distilled sets for {self.seeds} seeds of members")


@dataclass(frozen=True, kw_only=True)
class Continual(Experiment):
    """Let classes come in steps, keep a distilled set of each, and train students after every step.

    Args:
        architectures: of the students, names of the factory.
        steps: equal parts the classes come in.
        ipc: images kept of every class.
        orders: class orders, drawn by the seeds 0, 1, ...
        students: students per architecture, method, order and step.
        protocol: published recipe of the students on the memory.
        student_steps: training steps of a student, in place of the protocol's.
        lr: its peak learning rate, likewise.
        batch_size: images per step, likewise; at most all.
        augment: operations joined by _; auto, siamese or none; likewise.
        joint: also train students on all real images of the classes seen, as the upper line.
        joint_steps: their training steps.
        joint_lr: their peak learning rate.
        joint_batch_size: their images per step.

    Raises:
        UserError: a setting is out of range.
    """

    data: str = "MNIST5k"
    architectures: list[str] = field(metadata={"words": True})
    steps: int = 5
    ipc: int = 20
    orders: int = 5
    students: int = 1
    protocol: str = "frepo"
    student_steps: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    augment: str | None = None
    joint: bool = True
    joint_steps: int = 2000
    joint_lr: float = 1e-3
    joint_batch_size: int = 128

    def __post_init__(self) -> None:
        check_range("at least 1", steps=self.steps, ipc=self.ipc, orders=self.orders, students=self.students)
        if not self.architectures:
            raise UserError("architectures: name at least one")
        if not self.distillers or JOINT in self.distillers:
            raise UserError(f"methods: name at least one, as name: [file.yaml, --option=value], and none '{JOINT}'")

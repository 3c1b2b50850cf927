"""What distilled sets are good for: a memory for classes that come in steps, and privacy under attack.

The settings of both experiments are here, as the command line shows them; importing them imports nothing heavy.
"""

from dataclasses import dataclass
from typing import ClassVar

from lightning_dd.experiment import Experiment
from lightning_dd.parsing import option
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

    Raises:
        UserError: a setting is out of range.
    """

    members: int = option("training images that are distilled, per seed")
    lengths: list[int] = option("training steps after which a victim is attacked, increasing")
    held_out: int = option("non-members cut from the training split; 0 takes the test split", 0)
    seeds: int = option("disjoint sets of members, each distilled with its own seed", 1)
    victims: int = option("networks per source and seed", 5)
    architecture: str = option("of victims and shadow models", "conv:norm=none")
    lr: float = option("constant learning rate of Adam", 3e-4)
    batch_size: int = option("images per step, at most all", 256)
    real_batch_size: int = option("the same for training on all members", 1024)
    augment: str = option("operations joined by _, auto for FRePo's, none for none", "auto")
    real_augment: str | None = option("the same for training on all members; as augment if not given", None)
    attacks: list[str] = option("of threshold, logistic, mlp, forest, neighbours and lira", lambda: list(ATTACKS))
    folds: int = option("cross-validation of the four learned attacks", 5)
    attack_rows: int = option("members and non-members a learned attack is given, at most", 2000)
    shadows: int = option("LiRA's shadow models per real source and seed, 0 or an even number from 4", 0)
    distil_shadows: int = option("shadow models per method and seed, each with a distillation of its own; likewise", 0)
    val_fraction: float = option(
        "share of the members kept from training for a distiller's validation; these are no members then", 0.0
    )

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

    def run(self) -> None:
        """Distil, train, attack and report."""
        from lightning_dd.applications.membership import run_membership

        run_membership(self)


@dataclass(frozen=True, kw_only=True)
class Continual(Experiment):
    """Let classes come in steps, keep a distilled set of each, and train students after every step.

    Raises:
        UserError: a setting is out of range.
    """

    data: str = option("class name, or class path, of the real data", "MNIST5k")
    architectures: list[str] = option("of the students, names of the factory", words=True)
    steps: int = option("equal parts the classes come in", 5)
    ipc: int = option("images kept of every class", 20)
    orders: int = option("class orders, drawn by the seeds 0, 1, ...", 5)
    students: int = option("students per architecture, method, order and step", 1)
    protocol: str = option("published recipe of the students on the memory", "frepo")
    student_steps: int | None = option("training steps of a student, in place of the protocol's", None)
    lr: float | None = option("its peak learning rate, likewise", None)
    batch_size: int | None = option("images per step, likewise; at most all", None)
    augment: str | None = option("operations joined by _; auto, siamese or none; likewise", None)
    joint: bool = option("also train students on all real images of the classes seen, as the upper line", True)
    joint_steps: int = option("their training steps", 2000)
    joint_lr: float = option("their peak learning rate", 1e-3)
    joint_batch_size: int = option("their images per step", 128)

    def __post_init__(self) -> None:
        check_range("at least 1", steps=self.steps, ipc=self.ipc, orders=self.orders, students=self.students)
        if not self.architectures:
            raise UserError("architectures: name at least one")
        if not self.distillers or JOINT in self.distillers:
            raise UserError(f"methods: name at least one, as name: [file.yaml, --option=value], and none '{JOINT}'")

    def run(self) -> None:
        """Distil, train and report."""
        from lightning_dd.applications.continual import run_continual

        run_continual(self)

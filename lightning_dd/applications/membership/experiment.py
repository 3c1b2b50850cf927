"""What is trained on what: the members, the sources of victims, and the networks of a membership experiment."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dd.applications.membership.attacks import GRIDS
from lightning_dd.augment.frepo import Augmentation
from lightning_dd.data import RealRows
from lightning_dd.data.preprocess import to_unit
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distilled import DistilledSet
from lightning_dd.distilled.datamodule import check_match
from lightning_dd.distilled.set import library_versions
from lightning_dd.evaluators.ledger import Ledger, tensor_digest
from lightning_dd.experiment import distil
from lightning_dd.losses.labels import initial_labels
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError, unknown_name
from lightning_dd.utils.seeding import derive_seed, make_generator

REAL, RANDOM = "real members", "random members"
ATTACKS = ("threshold", *GRIDS, "lira")


@dataclass(frozen=True)
class Method:
    """How a distilled set comes about: configuration files and options of ``fit``, or finished files, one per seed."""

    configs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @classmethod
    def parse(cls, name: str, words: str | Sequence[str]) -> "Method":
        """Sort words into YAML files, options and distilled-set files.

        Raises:
            UserError: there are none, or both kinds of files.

        Example:
            >>> Method.parse("frepo", ["frepo.yaml", "--model.init_args.ipc=5"]).overrides
            ('--model.init_args.ipc=5',)
        """
        listed = [words] if isinstance(words, str) else list(words)
        overrides = tuple(word for word in listed if word.startswith("--"))
        files = tuple(word for word in listed if word.endswith(".safetensors"))
        configs = tuple(word for word in listed if word not in (*overrides, *files))
        if bool(configs) == bool(files) or (files and overrides):
            raise UserError(
                f"methods.{name} must be configuration files with options of fit, or distilled-set files, got {listed}"
            )
        return cls(configs, overrides, files)


@dataclass(frozen=True)
class Network:
    """A network to train: a victim, or a shadow model of one half of the pool."""

    source: str
    """:data:`REAL`, :data:`RANDOM` with a size, or a method's name."""
    seed: int
    index: int
    """Of the victim, or of the half."""
    shadow: bool = False

    @property
    def half(self) -> int | None:
        """The half of the pool its data comes from; ``None`` for the members."""
        return self.index if self.shadow else None


class Task(NamedTuple):
    """A network with everything its training needs."""

    train: DistilledSet
    images: Tensor
    labels: Tensor
    inside: Tensor
    held_out: Tensor
    recipe: Recipe
    augmentation: Augmentation
    seed: int
    path: Path


@dataclass(frozen=True)
class Experiment:
    """The settings of a membership experiment; plain values, so that it travels to other processes.

    Args:
        output: folder of everything the experiment writes.
        data: class name of the data set the members are a part of.
        members: images that are distilled and trained on, per seed.
        held_out: non-members cut from the training split; 0 takes the test split.
        methods: distilled sets by name.
        lengths: training steps after which a victim is asked.
        architecture: of victims and shadow models.
        recipe: how they are trained; its schedule should be constant, for shorter lengths are stops on the way.
        real_batch_size: batch size on all members, in place of the recipe's.
        real_augment: augmentation on all members, in place of the recipe's; ``None`` is the same.
        seeds: chunks of members, each distilled with its own seed.
        victims: networks per source and seed.
        attacks: of :data:`ATTACKS`.
        folds: of the learned attacks.
        attack_rows: members and non-members a learned attack is given, at most.
        shadows: shadow models per real source and seed, 0 or an even number from 4.
        distil_shadows: shadow models per method and seed, each with a distillation of its own; likewise.
        val_fraction: share of the members kept from training for validation; these are then no members.
        data_args: arguments of the data set other than ``root``.
        root: folder of the data.
        accelerator: ``cpu``, or anything else for a GPU where there is one.

    Raises:
        UserError: a setting is out of range.
    """

    output: Path
    data: str
    members: int
    held_out: int
    methods: Mapping[str, Method]
    lengths: tuple[int, ...]
    architecture: str
    recipe: Recipe
    real_batch_size: int = 1024
    real_augment: str | None = None
    seeds: int = 1
    victims: int = 5
    attacks: tuple[str, ...] = ATTACKS
    folds: int = 5
    attack_rows: int = 2000
    shadows: int = 0
    distil_shadows: int = 0
    val_fraction: float = 0.0
    data_args: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        for name in ("seeds", "victims", "members", "real_batch_size", "attack_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lengths or min(self.lengths) < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"lengths must be increasing numbers of steps from 1, got {list(self.lengths)}")
        for attack in self.attacks:
            if attack not in ATTACKS:
                raise unknown_name("attack", attack, ATTACKS)
        for name in ("shadows", "distil_shadows"):
            count = getattr(self, name)
            if count and (count < 4 or count % 2):
                raise UserError(f"{name} must be 0 or an even number from 4, got {count}")
        for name, method in self.methods.items():
            if name.startswith((REAL, RANDOM)):
                raise UserError(f"methods.{name}: the name is taken by a source of victims")
            if method.files and len(method.files) != self.seeds:
                raise UserError(f"methods.{name}: {len(method.files)} distilled sets for {self.seeds} seeds of members")
        for recipe in (self.recipe, self.real_recipe):
            recipe.augmentation(mirror=True)  # refuses an unknown operation

    @property
    def real_recipe(self) -> Recipe:
        """How networks are trained on all members."""
        augment = self.recipe.augment if self.real_augment is None else self.real_augment
        return replace(self.recipe, batch_size=self.real_batch_size, augment=augment)

    def part_args(self, seed: int, half: int | None = None) -> dict[str, Any]:
        """Arguments of the :class:`~lightning_dd.data.RealRows` that holds a seed's members, or a half of its pool."""
        return {
            "source": self.data,
            "rows": self.members,
            "chunk": seed,
            "held_out": self.held_out,
            "half": half,
            "val_fraction": self.val_fraction,
            "source_args": dict(self.data_args),
            **({} if self.root is None else {"root": self.root}),
        }

    def distilled_file(self, method: str, seed: int, half: int | None = None) -> Path:
        """Where a method's set for a seed, or for a shadow model's half, lies."""
        files = self.methods[method].files
        if files:
            return Path(files[seed])
        name = f"{method}-{seed}" + ("" if half is None else f"-half{half}")
        return self.output / "distilled" / name / "last.safetensors"

    def distil(self, method: str, seed: int, half: int | None = None) -> DistilledSet:
        """Distil members, or a half of the pool, or find it done; check what a file was made from.

        Raises:
            UserError: see :func:`~lightning_dd.experiment.distil`; or the file was distilled from other images.
        """
        chosen, path = self.methods[method], self.distilled_file(method, seed, half)
        args = self.part_args(seed, half)
        if not chosen.files:
            own = derive_seed(seed, "shadow", half) % 2**31 if half is not None else seed
            overrides = [f"--seed_everything={own}", f"--trainer.accelerator={self.accelerator}", *chosen.overrides]
            spec = {"class_path": RealRows.__name__, "init_args": args}
            distil(chosen.configs, spec, path.parent, overrides)
        distilled = DistilledSet.load(path)
        data = RealRows(**args)
        data.setup("fit")
        check_match(distilled, data)
        if distilled.data.get("fingerprint") != data.facts.fingerprint:
            raise UserError(
                f"methods.{method}: '{path}' was not distilled from these members; distil the part of "
                f"{self.data} that RealRows cuts with rows={self.members}, chunk={seed}, held_out={self.held_out}"
            )
        return distilled

    def has_shadows(self, source: str) -> int:
        """Number of shadow models a source's victims are attacked with."""
        if "lira" not in self.attacks:
            return 0
        if source not in self.methods:
            return self.shadows
        return 0 if self.methods[source].files else self.distil_shadows

    def task(self, network: Network) -> Task:
        """Assemble what a network's training needs.

        The file of its answers is named by a hash of all they depend on, so a changed setting or distilled set is
        another network.
        """
        data = RealRows(**self.part_args(network.seed, network.half))
        real = network.source not in self.methods
        if real:
            train = self._real_set(network)
        else:
            train = DistilledSet.load(self.distilled_file(network.source, network.seed, network.half))
        pool = data.pool()
        images = torch.cat([train.preprocessing(to_unit(block)) for block in torch.split(pool.images, 4096)])
        recipe = self.real_recipe if network.source == REAL else self.recipe
        seed = derive_seed(network.seed, "shadow" if network.shadow else "victim", network.index)
        inside, held_out = data.trained_on(pool.labels), torch.arange(len(pool.labels)) >= self.members
        views = {} if train.views is None else train.views.state_dict()
        digest = tensor_digest({"images": train.images, "labels": train.labels, **views})
        identity = {
            "train": [digest, train.label_kind, train.temperature],
            "pool": tensor_digest({"images": images, "labels": pool.labels, "inside": inside}),
            "architecture": self.architecture,
            "recipe": asdict(recipe),
            "mirror": data.mirror,
            "lengths": self.lengths,
            "seed": seed,
            "torch": library_versions(["torch"]),
        }
        path = Ledger(self.output / "networks").path(identity).with_suffix(".safetensors")
        return Task(train, images, pool.labels, inside, held_out, recipe, recipe.augmentation(data.mirror), seed, path)

    def real_rows(self, network: Network) -> Tensor:
        """Return the places in the pool of the images a network of a real source is trained on.

        Raises:
            UserError: a class has too few members for the random ones.
        """
        data = RealRows(**self.part_args(network.seed, network.half))
        pool = data.pool()
        rows = data.trained_on(pool.labels).nonzero().flatten()
        if network.source == REAL:
            return rows
        ipc = int(network.source.rpartition(" ")[2])
        kind = "shadow" if network.shadow else "victim"
        draw = make_generator(network.seed, "random members", kind, network.index)
        return rows[draw_per_class(pool.labels[rows], ipc, len(pool.class_names), draw)]

    def _real_set(self, network: Network) -> DistilledSet:
        """All training images of the data, or a random few per class, with FRePo's fixed labels."""
        members = RealRows(**self.part_args(network.seed))  # a shadow's half is normalised as the victim's images are
        members.setup("fit")
        assert members.preprocessing is not None
        pool, rows = members.pool(), self.real_rows(network)
        classes = pool.labels[rows]
        return DistilledSet(
            images=members.preprocessing(to_unit(pool.images[rows])),
            labels=initial_labels(classes, len(pool.class_names), "centred"),
            classes=classes,
            label_kind="centred",
            class_names=pool.class_names,
            preprocessing=members.preprocessing,
            method=network.source,
        )

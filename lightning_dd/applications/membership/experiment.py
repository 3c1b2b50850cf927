"""What is trained on what: the members, the sources of victims, and the networks of a membership experiment."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dd.applications.membership.attacks import GRIDS
from lightning_dd.applications.membership.victims import PoolScores, score_victim
from lightning_dd.data import RealRows
from lightning_dd.data.preprocess import to_unit
from lightning_dd.data.registry import DataChoice
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distilled import DistilledSet
from lightning_dd.distilled.datamodule import check_match, real_set
from lightning_dd.distilled.set import library_versions
from lightning_dd.experiment import Method, distil
from lightning_dd.jobs import Job, Tick, device_of, tensor_digest
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError, unknown_name
from lightning_dd.utils.seeding import derive_seed, make_generator

REAL, RANDOM = "real members", "random members"
ATTACKS = ("threshold", *GRIDS, "lira")


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

    @property
    def own_seed(self) -> int:
        """The seed of its weights, batches, augmentation and dropout."""
        return derive_seed(self.seed, "shadow" if self.shadow else "victim", self.index)


@dataclass(frozen=True)
class Experiment:
    """The settings of a membership experiment; plain values, so that it travels to other processes.

    Args:
        output: folder of everything the experiment writes.
        data: the data set the members are a part of.
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
        accelerator: ``cpu``, or anything else for a GPU where there is one.

    Raises:
        UserError: a setting is out of range.
    """

    output: Path
    data: DataChoice
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
        return self.data.as_source() | {
            "rows": self.members,
            "chunk": seed,
            "held_out": self.held_out,
            "half": half,
            "val_fraction": self.val_fraction,
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
            overrides = [f"--seed_everything={own}", f"--trainer.accelerator={self.accelerator}", *chosen.options]
            spec = {"class_path": RealRows.__name__, "init_args": args}
            distil(chosen.configs, spec, path.parent, overrides)
        distilled = DistilledSet.load(path)
        data = RealRows(**args)
        data.setup("fit")
        check_match(distilled, data)
        if distilled.data.get("fingerprint") != data.facts.fingerprint:
            raise UserError(
                f"methods.{method}: '{path}' was not distilled from these members; distil the part of "
                f"{self.data.name} that RealRows cuts with rows={self.members}, chunk={seed}, held_out={self.held_out}"
            )
        return distilled

    def has_shadows(self, source: str) -> int:
        """Number of shadow models a source's victims are attacked with."""
        if "lira" not in self.attacks:
            return 0
        if source not in self.methods:
            return self.shadows
        return 0 if self.methods[source].files else self.distil_shadows

    def job(self, network: Network) -> Job:
        """Return a network as a job; a changed setting or distilled set makes it another one."""
        data, train = RealRows(**self.part_args(network.seed, network.half)), self.training_set(network)
        pool = data.pool()
        views = {} if train.views is None else train.views.state_dict()
        digest = tensor_digest({"images": train.images, "labels": train.labels, **views})
        inside = data.trained_on(pool.labels)
        identity = {
            "train": [digest, train.label_kind, train.temperature, train.mirror],
            "preprocessing": tensor_digest(train.preprocessing.state_dict()),
            "pool": tensor_digest({"images": pool.images, "labels": pool.labels, "inside": inside}),
            "architecture": self.architecture,
            "recipe": asdict(self._recipe(network)),
            "lengths": self.lengths,
            "seed": network.own_seed,
            "torch": library_versions(["torch"]),
        }
        return Job(f"{network.source} {network.seed} {network.index}", identity, network, self.lengths[-1])

    def train(self, network: Network, tick: Tick) -> dict[str, Any]:
        """Train one victim or shadow model and return its answers about the pool: the fields of ``PoolScores``."""
        data, train = RealRows(**self.part_args(network.seed, network.half)), self.training_set(network)
        pool = data.pool()
        images = torch.cat([train.preprocessing(to_unit(block)) for block in torch.split(pool.images, 4096)])
        logits, losses = score_victim(
            train,
            images,
            pool.labels,
            self.architecture,
            self._recipe(network),
            self.lengths,
            network.own_seed,
            device_of(self.accelerator),
        )
        return vars(
            PoolScores(
                lengths=np.array(self.lengths),
                logits=logits,
                losses=losses,
                labels=pool.labels.numpy(),
                inside=data.trained_on(pool.labels).numpy(),
                held_out=np.arange(len(pool.labels)) >= self.members,
                images=np.array([len(train)]),
            )
        )

    def training_set(self, network: Network) -> DistilledSet:
        """Return what a network learns from: a distilled set, or members with FRePo's fixed labels."""
        if network.source in self.methods:
            return DistilledSet.load(self.distilled_file(network.source, network.seed, network.half))
        members = RealRows(**self.part_args(network.seed))  # a shadow's half is normalised as the victim's images are
        members.setup("fit")
        assert members.preprocessing is not None
        pool, rows = members.pool(), self.real_rows(network)
        images = members.preprocessing(to_unit(pool.images[rows]))
        return real_set(members, images, pool.labels[rows], "centred", network.source)

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

    def _recipe(self, network: Network) -> Recipe:
        return self.real_recipe if network.source == REAL else self.recipe

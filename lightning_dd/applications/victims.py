"""The networks of a membership experiment: what they are trained on, and what they answer about a pool of images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.applications import Membership
from lightning_dd.applications.attacks import Array
from lightning_dd.data import RealRows, Split
from lightning_dd.data.sampling import answers, draw_per_class
from lightning_dd.distilled import DistilledSet
from lightning_dd.distilled.datamodule import check_match, real_set
from lightning_dd.distilled.set import library_versions
from lightning_dd.experiment import distil_stage
from lightning_dd.jobs import Job, Record, Tick, device_of, tensor_digest
from lightning_dd.losses.krr import initial_labels
from lightning_dd.models.factory import build_network
from lightning_dd.students.loop import step_flops, train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import derive_seed, make_generator

REAL, RANDOM = "real members", "random members"


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
class PoolScores:
    """What one network answers about every image of a pool, after several training lengths."""

    lengths: Array
    """``(L,)`` training steps."""
    logits: Array
    """``(L, P, C)`` float32."""
    losses: Array
    """``(L, P)`` float32: the loss the network was trained with, on the true class."""
    labels: Array
    """``(P,)`` int64 true classes."""
    inside: NDArray[np.bool_]
    """``(P,)``, whether the image belongs to the data the training set was made from."""
    held_out: NDArray[np.bool_]
    """``(P,)``, whether the image is one of the held-out ones (shadow models may learn from these)."""
    images: Array
    """``(1,)`` how many images the network learned from."""


def part(experiment: Membership, seed: int, half: int | None = None) -> RealRows:
    """Return a seed's members, or a half of its pool."""
    return RealRows(
        rows=experiment.members,
        chunk=seed,
        held_out=experiment.held_out,
        half=half,
        val_fraction=experiment.val_fraction,
        **experiment.source,
    )


def distilled_file(experiment: Membership, method: str, seed: int, half: int | None = None) -> Path:
    """Return where a method's set for a seed, or for a shadow model's half, lies."""
    files = experiment.distillers[method].files
    if files:
        return Path(files[seed])
    name = f"{method}-{seed}" + ("" if half is None else f"-half{half}")
    return Path(experiment.output) / "distilled" / name / "last.safetensors"


def distil_members(experiment: Membership, method: str, seed: int, half: int | None = None) -> DistilledSet:
    """Distil members, or a half of the pool, or find it done; refuse a file that was made from other images."""
    chosen, path = experiment.distillers[method], distilled_file(experiment, method, seed, half)
    data = part(experiment, seed, half)
    if not chosen.files:
        own = seed if half is None else derive_seed(seed, "shadow", half) % 2**31
        overrides = [f"--seed_everything={own}", f"--trainer.accelerator={experiment.accelerator}", *chosen.options]
        distil_stage(chosen.configs, data.recipe(), path.parent, overrides)
    distilled = DistilledSet.load(path)
    data.setup("fit")
    check_match(distilled, data)
    if distilled.data.get("fingerprint") != data.facts.fingerprint:
        raise UserError(
            f"methods.{method}: '{path}' was not distilled from these members; distil the part of {experiment.data} "
            f"that RealRows cuts with rows={experiment.members}, chunk={seed}, held_out={experiment.held_out}"
        )
    return distilled


def recipe_on(experiment: Membership, source: str) -> Recipe:
    """Return how networks learn from a source: at a constant rate, for shorter lengths are stops on the way."""
    all_real = source == REAL
    return Recipe(
        lr=experiment.lr,
        warmup=0,
        schedule="constant",
        batch_size=experiment.real_batch_size if all_real else experiment.batch_size,
        augment=(experiment.real_augment if all_real else None) or experiment.augment,
    )


def job_of(experiment: Membership, network: Network) -> Job:
    """Return a network as a job; a changed setting or distilled set makes it another one."""
    data, train = part(experiment, network.seed, network.half), training_set(experiment, network)
    pool = data.pool()
    views = {} if train.views is None else train.views.state_dict()
    digest = tensor_digest({"images": train.images, "labels": train.labels, **views})
    inside = data.trained_on(pool.labels)
    identity = {
        "train": [digest, train.label_kind, train.temperature, train.mirror],
        "preprocessing": tensor_digest(train.preprocessing.state_dict()),
        "pool": tensor_digest({"images": pool.images, "labels": pool.labels, "inside": inside}),
        "architecture": experiment.architecture,
        "recipe": asdict(recipe_on(experiment, network.source)),
        "lengths": experiment.lengths,
        "seed": network.own_seed,
        "torch": library_versions(["torch"]),
    }
    size = (len(train), train.num_classes, train.image_shape)
    flops = step_flops(experiment.architecture, recipe_on(experiment, network.source), *size)
    return Job(f"{network.source} {network.seed} {network.index}", identity, network, experiment.lengths[-1], flops)


def train_network(experiment: Membership, network: Network, tick: Tick) -> Record:
    """Train one victim or shadow model and return its answers about the pool: the fields of :class:`PoolScores`."""
    data, train = part(experiment, network.seed, network.half), training_set(experiment, network)
    pool, recipe = data.pool(), recipe_on(experiment, network.source)
    device, split = device_of(experiment.accelerator), Split(pool.images, pool.labels, train.preprocessing)
    lengths = experiment.lengths
    logits, losses = score_victim(train, split, experiment.architecture, recipe, lengths, network.own_seed, device)
    scores = PoolScores(
        lengths=np.array(lengths),
        logits=logits,
        losses=losses,
        labels=pool.labels.numpy(),
        inside=data.trained_on(pool.labels).numpy(),
        held_out=np.arange(len(pool.labels)) >= experiment.members,
        images=np.array([len(train)]),
    )
    return vars(scores)


def training_set(experiment: Membership, network: Network) -> DistilledSet:
    """Return what a network learns from: a distilled set, or members with FRePo's fixed labels."""
    if network.source in experiment.distillers:
        return DistilledSet.load(distilled_file(experiment, network.source, network.seed, network.half))
    members = part(experiment, network.seed)  # a shadow's half is normalised as the victim's images are
    members.setup("fit")
    assert members.preprocessing is not None
    images, labels, _ = members.pool()
    drawn = Split(images, labels, members.preprocessing).take(real_rows(experiment, network))
    return real_set(members, *drawn, "centred", network.source)


def real_rows(experiment: Membership, network: Network) -> Tensor:
    """Return the places in the pool of the images a network of a real source is trained on."""
    data = part(experiment, network.seed, network.half)
    pool = data.pool()
    rows = data.trained_on(pool.labels).nonzero().flatten()
    if network.source == REAL:
        return rows
    ipc = int(network.source.rpartition(" ")[2])
    kind = "shadow" if network.shadow else "victim"
    draw = make_generator(network.seed, "random members", kind, network.index)
    return rows[draw_per_class(pool.labels[rows], ipc, len(pool.class_names), draw)]


def score_victim(
    train: DistilledSet,
    pool: Split,
    architecture: str,
    recipe: Recipe,
    lengths: Sequence[int],
    seed: int,
    device: torch.device,
) -> tuple[Array, Array]:
    """Train a fresh network on a set once and ask it about a pool of P images after each of L increasing lengths.

    A shorter length is a stop on the way to the longer ones, so the recipe's learning rate should be constant.

    Returns:
        Logits ``(L, P, num_classes)`` and losses ``(L, P)``, float32.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    found: list[Tensor] = []
    network = build_network(architecture, train.num_classes, train.image_shape, seed).to(device)
    recipe = replace(recipe, steps=lengths[-1])
    train_student(network, train, recipe, seed, lengths, lambda asked, _: found.append(answers(asked, pool, device)))
    logits = torch.stack(found)
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"a victim's training diverged; lower lr (now {recipe.lr}) or the training lengths")
    return logits.numpy(), true_losses(logits, pool.labels.cpu(), train.label_kind).numpy()


def true_losses(logits: Tensor, labels: Tensor, label_kind: str) -> Tensor:
    """Return the loss ``(L, P)`` of logits ``(L, P, C)`` on true classes ``(P,)``, as the victim was trained with.

    Half the squared error to FRePo's centred target for regression labels, cross-entropy for hard and soft ones.
    """
    if label_kind in ("hard", "soft"):
        return F.cross_entropy(logits.movedim(-1, 1), labels.expand(len(logits), -1), reduction="none")
    return 0.5 * (logits - initial_labels(labels, logits.shape[-1], "centred")).square().sum(-1)

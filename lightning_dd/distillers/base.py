"""The base of every distiller: it owns the synthetic set; a subclass says what is minimised."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_dd.data.base import RealData
from lightning_dd.data.images import DataFacts, Patches, Split
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.distillers.checkpoint import Resumable
from lightning_dd.distillers.run import run_settings
from lightning_dd.losses.krr import LABEL_KINDS, SolveError
from lightning_dd.models.factory import Architectures, NetworkMixture, build_network
from lightning_dd.models.interface import Network, logits_in_slices
from lightning_dd.pretrained.classifier import Committee, Teacher
from lightning_dd.pretrained.task import Task
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.students.recipe import protocol as published
from lightning_dd.synthetic.labels import Labels, TeacherLabels
from lightning_dd.synthetic.parameterisation import Parameterisation, Pixels, SyntheticSet
from lightning_dd.utils.arguments import RemembersArguments, plain_values, public_settings, revive, without_places
from lightning_dd.utils.commit import source_commit
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.scoring import ScoredModule
from lightning_dd.utils.seeding import derive_seed, make_generator
from lightning_dd.utils.trainer import steps_to_log


@dataclass(frozen=True)
class Probe:
    """The student that is trained for each validation score of a run.

    Args:
        steps: training steps; ``None`` takes the protocol's.
        lr: peak learning rate, likewise.
        protocol: a published recipe (:data:`~lightning_dd.students.recipe.PROTOCOLS`); ``None`` takes the method's own.

    Raises:
        UserError: the protocol is unknown, or a number is out of range.
    """

    steps: int | None = None
    lr: float | None = None
    protocol: str | None = None

    def __post_init__(self) -> None:
        check_range("at least 1", "probe.", steps=self.steps)
        check_range("positive", "probe.", lr=self.lr)
        self.recipe("frepo")

    def recipe(self, own: str) -> Recipe:
        """Return how it is trained where the method's own protocol has this name."""
        return published(self.protocol or own, steps=self.steps, lr=self.lr)


class Distiller(Resumable, ScoredModule):
    """A LightningModule that owns learnable synthetic images and labels.

    Lightning's optimizer is the *outer* one (synthetic images and labels), so ``global_step``, ``max_steps`` and
    TensorBoard's axis count outer steps.

    A subclass must answer :meth:`outer_terms`; it may override :meth:`configure_optimizers`, :meth:`initialise`,
    :attr:`network` and :attr:`student_architecture`. A method that looks through a pool of partly trained networks is
    a :class:`~lightning_dd.distillers.PoolDistiller`, one that needs trained networks a
    :class:`~lightning_dd.distillers.TeacherDistiller`.

    Args:
        ipc: images per class that are stored, at least 1.
        architecture: the network to distil with, as ``name`` or ``name:option=value,...``; several names, or names
            with probabilities, of which the most probable one stands for "the same" architecture.
        labels: ``learned``, ``centred`` (FRePo's start values, fixed) or ``hard`` (one-hot, fixed) as far as the method
            defines them (:attr:`label_kinds`; MTT learns ``logits``, too); ``soft`` for a teacher's, or any
            :class:`~lightning_dd.synthetic.Labels` object, which the finished set gets.
        init: ``real`` starts from random training images, ``patches`` from random square crops of them
            (:class:`~lightning_dd.data.images.Patches`), ``noise`` from a standard normal; latents ignore it.
        parameterisation: what the images are learned through; ``None`` is :class:`~lightning_dd.synthetic.Pixels`.
        lr: outer learning rate.
        probe: the student that is trained for each validation score, by the method's own protocol unless it names one.
        train_missing: train what the method builds on and the cache lacks (teachers, experts, generators); false
            refuses instead.
        seed: the run's one seed.

    Attributes:
        synthetic: the synthetic set; there from ``setup`` on.
        task: what is distilled: facts, preprocessing and real data; there from ``setup`` on.
        run: the whole run in plain values (:mod:`lightning_dd.distillers.run`); there from ``setup`` for a fit on.
        shown_ipc: images per class that outer steps and students see: ``ipc``, unless one stored image makes several.

    Raises:
        UserError: an argument is out of range.
    """

    label_kinds: ClassVar[tuple[str, ...]] = LABEL_KINDS
    """The labels that outer steps of the method are defined for, its own first."""
    learns: ClassVar[bool] = True
    """Whether outer steps change the synthetic set; a method that selects real images only does not."""
    protocol: ClassVar[str] = "frepo"
    """The published recipe of the method's students, where their labels do not bring their own."""

    synthetic: SyntheticSet
    task: Task

    def __init__(
        self,
        ipc: int = 1,
        architecture: Architectures = "conv",
        labels: str | Labels = "learned",
        init: str = "real",
        parameterisation: Parameterisation | None = None,
        lr: float = 0.01,
        probe: Probe = Probe(),
        train_missing: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Copies, so that several distillers can be made with one object; in a tuple, for the synthetic set owns it.
        parameterisation, labels = revive(parameterisation), revive(labels)  # plain in a checkpoint
        self.parameterisation = (Pixels() if parameterisation is None else parameterisation.again(),)
        self.save_hyperparameters(ignore=["parameterisation"])
        self.save_hyperparameters(plain_values({**self.hparams, "parameterisation": self.parameterisation[0]}))
        strategy = TeacherLabels() if labels == "soft" else labels
        self.label_strategy = strategy.again() if isinstance(strategy, Labels) else None
        kind = (strategy.while_distilling or self.label_kinds[0]) if isinstance(strategy, Labels) else strategy
        if kind not in self.label_kinds:
            kinds = ", ".join((*self.label_kinds, "soft"))
            raise UserError(f"labels of {type(self).__name__} must be one of {kinds}, got '{kind}'")
        if ipc < 1:
            raise UserError(f"ipc (images per class) must be at least 1, got {ipc}")
        check_range("positive", lr=lr)
        if init not in ("real", "patches", "noise"):
            raise UserError(f"init must be 'real', 'patches' or 'noise', got '{init}'")
        self.architectures, self.networks = architecture, NetworkMixture.parse(architecture)
        self.architecture = self.networks.main
        self.ipc, self.init, self.lr = ipc, init, lr
        self.label_kind = "soft" if kind == "logits" else kind  # what a file calls labels that a softmax takes
        self.shown_ipc = ipc * self.parameterisation[0].shown_per_stored
        self.probe = Probe(**probe) if isinstance(probe, dict) else probe
        self.train_missing, self.seed = train_missing, seed
        self._watched: dict[str, Tensor] = {}
        self.run: dict[str, Any] = {}

    @abstractmethod
    def outer_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the named terms whose sum an outer step minimises.

        Random numbers come from :meth:`step_generator`, real images from ``self.task.train``.

        Args:
            images: synthetic images ``(n, C, H, W)``, normalised, with graph.
            labels: synthetic labels ``(n, num_classes)``, with graph where learned.
        """

    @property
    def network(self) -> Network:
        """The network the current outer step looks through, in inference mode.

        Raises:
            UserError: the method looks through none.
        """
        raise UserError(f"{type(self).__name__} has no network of its own to ask for a prediction")

    @property
    def facts(self) -> DataFacts:
        """Facts of the data: its classes, image shape and names."""
        return self.task.facts

    @property
    def student_architecture(self) -> str:
        """The architecture students of this set are trained with when they stand for "the same" one."""
        return self.architecture

    def committee(self, teacher: Teacher | None = None) -> Committee:
        """Return trained networks: the given ones, or those the method has by itself."""
        return (teacher or Teacher()).committee(self.task, self.architectures)

    def step_generator(self, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator that depends on seed, purpose, rank and outer step alone, so a resumed run is exact."""
        return make_generator(
            self.seed, *purpose, self.trainer.global_rank, self.trainer.fit_loop.total_batch_idx, device=device
        )

    def build_network(self, seed: int, architecture: str | None = None) -> Network:
        """Build a fresh network for this data from a seed, with the distilling architecture unless another is named."""
        return build_network(architecture or self.architecture, self.facts.num_classes, self.facts.image_shape, seed)

    def watch(self, **values: Tensor) -> None:
        """Hand scalar diagnostics to the logger, which reads the last ones at its next step: they cost nothing else."""
        self._watched.update({name: value.detach() for name, value in values.items()})  # kept, but without its graph

    def configure_optimizers(self) -> Any:
        """Return the outer optimizer: Adam on whatever the synthetic set learns."""
        return torch.optim.Adam(self.synthetic.parameter_groups(self.lr))

    def distilled_set(self, *, views: bool = True, **training: Any) -> DistilledSet:
        """Return the current synthetic set as a file-ready object.

        Args:
            views: have a teacher label views as well, where labels are a teacher's; false for a look at the set.
            training: facts of the run to keep beside it (outer step, validation score).

        Raises:
            UserError: the run has no finite numbers any more.
        """
        self.require_health(about_to_write=True)
        with torch.inference_mode(mode=False):  # for a student may be trained on it
            images, labels = (part.detach().cpu().clone().contiguous() for part in self.synthetic())
            stored = self.synthetic.parameterisation.stored()
            images = images if stored is None else stored.shown(self.task.preprocessing)  # as a reader makes them
        distilled = DistilledSet(
            images=images,
            labels=labels,
            classes=self.synthetic.classes.cpu(),
            label_kind=self.label_kind,
            class_names=self.facts.class_names,
            preprocessing=self.task.preprocessing,
            data=self.task.origin,
            method=type(self).__name__,
            config=without_places({**public_settings(self.hparams), "student_architecture": self.student_architecture}),
            training={"seed": self.seed, "versions": library_versions(), "commit": source_commit(), **training},
            run=self.run,
            stored=stored,
        )
        if self.label_strategy is not None:
            return self.label_strategy.finish(distilled, self.committee, self.seed, views)
        return distilled

    def setup(self, stage: str) -> None:
        """Take the task from the DataModule; for a first fit, draw the initial images.

        Lightning restores a checkpoint after this hook, so a resumed run overwrites what is initialised here.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RealData):
            raise UserError(f"a distiller needs a RealData module as its data, got {type(data).__name__}")
        self.task = Task.of(data, self.trainer, self.train_missing)
        if stage == "fit":
            self.run = run_settings(self, self.trainer)
            rank_zero_info(data.summary())
        self.make_accuracy(self.facts.num_classes)
        if not hasattr(self, "synthetic"):
            self.make_synthetic()
            self.initialise(self.task.train)
        if self.label_strategy is not None:
            self.label_strategy.prepare(self.committee)

    def make_synthetic(self) -> None:
        """Make the synthetic set, its images all zero."""
        self.synthetic = SyntheticSet(self.parameterisation[0], self.ipc, self.label_kind, self.task)

    def initialise(self, train: Split) -> None:
        """Fill the new synthetic set for a first fit; every rank draws the same."""
        self.start(self.synthetic.parameterisation, train)

    def start(self, parameterisation: Parameterisation, train: Split) -> None:
        """Fill tensors that have just been built; with those of the same options, it gives the same each time."""
        generator, init = make_generator(self.seed, "init"), self.init
        if init == "patches":
            train, init = Patches(train, generator), "real"
        parameterisation.prepare(self.task)
        parameterisation.start(init, train, self.shown_ipc, generator)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One outer step; ``batch`` only counts."""
        images, labels = self.synthetic()
        try:
            terms = self.outer_terms(images, labels)
        except SolveError as error:
            raise self.stop_at(error) from None
        loss = torch.stack(list(terms.values())).sum()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, OuterTerm):
                loss, more = callback.add(self.trainer, self, images, labels, loss)
                terms, loss = terms | more, torch.stack([loss, *more.values()]).sum()
        self.note(terms)
        if steps_to_log(self.trainer) == 0:
            terms = {f"outer/{name}": value.detach() for name, value in terms.items()}
            for name, value in ({"outer/loss": loss.detach()} | terms | self._watched).items():
                self.log(name, value, prog_bar=name in ("outer/loss", "outer/accuracy"))
            self._watched.clear()
        return loss

    def start_scoring(self) -> None:
        """Train a student on the current synthetic set: its accuracy is the run's score.

        Every validation starts from the same weights and order, so scores of one run compare.
        """
        seed, distilled = derive_seed(self.seed, "probe"), self.distilled_set()
        brought = self.label_strategy.protocol if self.label_strategy is not None else None
        recipe = self.probe.recipe(brought or self.protocol)
        recipe = recipe.suited_to(self.student_architecture, distilled.training.get("step_size"))
        with torch.inference_mode(mode=False):  # Lightning is in it already, and parameters made in it cannot learn
            probe = self.build_network(seed, self.student_architecture).to(self.device)
            train_student(probe, distilled, recipe, seed)
        self._probe = (probe,)  # in a tuple: a registered network would enter the checkpoint

    def scored_logits(self, images: Tensor) -> Tensor:
        """Return the student's logits."""
        return logits_in_slices(self._probe[0], images)


class OuterTerm(Callback, RemembersArguments, ABC):
    """Add a term to the outer loss of whatever distiller is fitted. A subclass answers :meth:`add`.

    Example::

        class Smooth(OuterTerm):
            def add(self, trainer, distiller, images, labels, loss):
                return loss, {"smooth": 0.1 * images.diff(dim=-1).square().mean()}

    Raises:
        UserError: (in ``setup`` for a fit) the module is no distiller, or learns nothing.
    """

    @abstractmethod
    def add(
        self, trainer: Trainer, distiller: Distiller, images: Tensor, labels: Tensor, loss: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss so far, and the terms to add to it by name; no terms where none is due at this outer step.

        Args:
            trainer: of the run; ``trainer.global_step`` counts outer steps from 0.
            distiller: whose step it is; ``distiller.watch`` logs scalars.
            images: all synthetic images ``(n, C, H, W)``, normalised, with graph.
            labels: all synthetic labels ``(n, num_classes)``, with graph where learned.
            loss: the method's own loss and the terms before, with graph.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what there is nothing to add to."""
        if stage != "fit":
            return
        name, method = type(self).__name__, type(pl_module).__name__
        if not isinstance(pl_module, Distiller):
            raise UserError(f"{name} attaches to a distiller, got {method}")
        if not pl_module.learns:
            raise UserError(f"{name} has nothing to act on: {method} selects real images and learns none")

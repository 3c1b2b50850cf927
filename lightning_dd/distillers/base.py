"""The base of every distiller: it owns the synthetic set; a subclass says what is minimised."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dd.augment.frepo import default_strategy
from lightning_dd.data.base import RealData
from lightning_dd.data.facts import DataFacts
from lightning_dd.data.images import Batch, Split
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.sampling import ClassBlocks, ShuffledStream, next_batch
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network
from lightning_dd.pretrained.generator import prepare_generator
from lightning_dd.students.recipe import Recipe, train_student
from lightning_dd.synthetic.latents import build_synthetic
from lightning_dd.synthetic.parameterisation import parse_parameterisation
from lightning_dd.synthetic.pixels import LABEL_KINDS, SyntheticSet, check_synthetic
from lightning_dd.utils.checkpoint import check_data, check_settings, gather_ranks, public_settings, take_rank
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.scoring import ScoredModule
from lightning_dd.utils.seeding import derive_seed, make_generator

ExtraLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""From all synthetic images and labels and the loss so far, with graph, to that loss and terms added to it."""

STATE_KEY = "lightning_dd"
"""Where a checkpoint keeps what lies outside the module tree."""


class Distiller(ScoredModule):
    """A LightningModule that owns learnable synthetic images and labels.

    Lightning's optimizer is the *outer* one (synthetic images and labels), so ``global_step``, ``max_steps`` and
    TensorBoard's axis count outer steps.

    A subclass must answer :meth:`outer_terms`; it may override :meth:`configure_optimizers`, :meth:`initialise`,
    :attr:`network` and :attr:`student_architecture`. A method that looks through a pool of partly trained networks is
    a :class:`~lightning_dd.distillers.PoolDistiller`.

    Any distiller takes further terms: what is in :attr:`extra_losses` is added to the outer loss, and this is how
    MetaDD attaches without a line in a subclass.

    Args:
        ipc: images per class, at least 1.
        architecture: the network to distil with, as ``name`` or ``name:option=value,...``.
        labels: ``learned``, ``centred`` (FRePo's start values, fixed) or ``hard`` (one-hot, fixed); a method may not
            define all of them (:attr:`label_kinds`).
        init: ``real`` starts from random training images, ``noise`` from a standard normal; latents ignore it.
        parameterisation: what the images are learned through: ``pixels``, or ``latents:option=value,...`` of a
            generator (:class:`~lightning_dd.synthetic.parameterisation.LatentOptions`).
        lr: outer learning rate.
        real_batch_size: real images per outer step.
        probe_steps: steps of the student trained for each validation score; ``None`` takes the recipe's table.
        probe_lr: its learning rate.
        train_missing: train what the method builds on and the cache lacks (teacher, experts, generator); false
            refuses instead.
        seed: the run's one seed.

    Raises:
        UserError: an argument is out of range.
    """

    label_kinds: ClassVar[tuple[str, ...]] = LABEL_KINDS
    """The forms of labels the method is defined for."""
    learns: ClassVar[bool] = True
    """Whether outer steps change the synthetic set; a method that selects real images only does not."""

    def __init__(
        self,
        ipc: int = 1,
        architecture: str = "conv",
        labels: str = "learned",
        init: str = "real",
        parameterisation: str = "pixels",
        lr: float = 0.01,
        real_batch_size: int = 1024,
        probe_steps: int | None = None,
        probe_lr: float = 3e-4,
        train_missing: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_synthetic(ipc, labels)
        if init not in ("real", "noise"):
            raise UserError(f"init must be 'real' or 'noise', got '{init}'")
        if labels not in self.label_kinds:
            kinds = ", ".join(self.label_kinds)
            raise UserError(f"labels of {type(self).__name__} must be one of {kinds}, got '{labels}'")
        self.latents = parse_parameterisation(parameterisation)
        if self.latents is not None and not self.learns:
            raise UserError(f"{type(self).__name__} selects real images: parameterisation must be pixels")
        if lr <= 0:
            raise UserError(f"lr must be positive, got {lr}")
        if real_batch_size < 1:
            raise UserError(f"real_batch_size must be at least 1, got {real_batch_size}")
        self.ipc, self.architecture, self.label_kind, self.init = ipc, architecture, labels, init
        self.lr, self.real_batch_size = lr, real_batch_size
        self.probe_recipe = Recipe(steps=probe_steps, lr=probe_lr)
        self.train_missing = train_missing
        self.seed = seed
        self.synthetic: SyntheticSet | None = None
        self.facts: DataFacts | None = None
        self.preprocessing: Preprocessing | None = None
        self.data_spec: dict[str, Any] = {}
        self.extra_losses: list[ExtraLoss] = []
        self._real_stream: ShuffledStream | None = None
        self._class_blocks: ClassBlocks | None = None
        self._watched: dict[str, Tensor] = {}

    @abstractmethod
    def outer_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the named terms whose sum an outer step minimises.

        Real images come from :meth:`draw_real` or :meth:`draw_real_per_class`, random numbers from
        :meth:`step_generator`.

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

    def draw_real(self) -> Batch:
        """Draw the next ``real_batch_size`` training images of a shuffled stream: ``(B, C, H, W)``, and classes."""
        assert self._real_stream is not None
        return next_batch(self._train(), self._real_stream, self.device)

    def draw_real_per_class(self, count: int) -> Batch:
        """Draw ``count`` training images of every class (at most the smallest class), in blocks by class."""
        train = self._train()
        if self._class_blocks is None:
            self._class_blocks = ClassBlocks(train.labels, self.require_facts().num_classes)
        generator = self.step_generator("class blocks", device=train.labels.device)
        return train.take(self._class_blocks.draw(count, generator), self.device)

    def step_generator(self, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator that depends on seed, purpose, rank and outer step alone, so a resumed run is exact."""
        return make_generator(
            self.seed, *purpose, self.trainer.global_rank, self.trainer.fit_loop.total_batch_idx, device=device
        )

    def configure_optimizers(self) -> Any:
        """Return the outer optimizer: Adam on whatever the synthetic set learns."""
        return torch.optim.Adam(self.require_synthetic().parameter_groups(self.lr))

    @property
    def student_architecture(self) -> str:
        """The architecture students of this set are trained with when they stand for "the same" one."""
        return self.architecture

    def build_network(self, seed: int, architecture: str | None = None) -> Network:
        """Build a fresh network for this data from a seed, with the distilling architecture unless another is named."""
        facts = self.require_facts()
        return build_network(architecture or self.architecture, facts.num_classes, facts.image_shape, seed)

    def watch(self, **values: Tensor) -> None:
        """Hand scalar diagnostics to the logger, which reads the last ones at its next step: they cost nothing else."""
        self._watched.update({name: value.detach() for name, value in values.items()})  # kept, but without its graph

    def require_synthetic(self) -> SyntheticSet:
        """Return the synthetic set, which exists from ``setup`` on."""
        if self.synthetic is None:
            raise RuntimeError("the synthetic set does not exist yet: run a Trainer, or load a checkpoint")
        return self.synthetic

    def require_facts(self) -> DataFacts:
        """Return what the data said of itself, known from ``setup`` on."""
        if self.facts is None:
            raise RuntimeError("the data is not known yet: run a Trainer, or load a checkpoint")
        return self.facts

    def distilled_set(self, *, views: bool = True, **training: Any) -> DistilledSet:
        """Return the current synthetic set as a file-ready object.

        Args:
            views: have a teacher label its views as well, where the method has soft labels; false for a look at it.
            training: facts on the run to keep beside it (outer step, validation score).
        """
        synthetic, facts = self.require_synthetic(), self.require_facts()
        assert self.preprocessing is not None
        with torch.inference_mode(mode=False):  # for a student may be trained on it
            images, labels = (part.detach().cpu().clone().contiguous() for part in synthetic())
        return DistilledSet(
            images=images,
            labels=labels,
            classes=synthetic.classes.cpu(),
            label_kind=self.label_kind,
            class_names=facts.class_names,
            preprocessing=self.preprocessing,
            data={"name": facts.name, "spec": self.data_spec, "fingerprint": facts.fingerprint, "mirror": facts.mirror},
            method=type(self).__name__,
            config={**public_settings(self.hparams), "student_architecture": self.student_architecture},
            training={"seed": self.seed, "versions": library_versions(), **training},
        )

    def setup(self, stage: str) -> None:
        """Take the facts from the DataModule; for a first fit, draw the initial images.

        Lightning restores a checkpoint after this hook, so a resumed run overwrites what is initialised here.

        Raises:
            UserError: the data does not fit the settings (too few images of a class, a network too deep).
        """
        data = self.real_data()
        self.facts, self.preprocessing, self.data_spec = data.facts, data.preprocessing, data.spec()
        assert data.train is not None
        self.make_accuracy(self.facts.num_classes)
        if self.synthetic is None:
            self._build_synthetic()
            self.initialise(data.train)
        if stage != "fit":
            return
        order = make_generator(self.seed, "real", self.trainer.global_rank, device=data.train.labels.device)
        self._real_stream = ShuffledStream(len(data.train.labels), self.real_batch_size, order)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One outer step; ``batch`` only counts."""
        images, labels = self.require_synthetic()()
        terms = self.outer_terms(images, labels)
        loss = torch.stack(list(terms.values())).sum()
        for extra in self.extra_losses:
            loss, more = extra(images, labels, loss)
            terms, loss = terms | more, torch.stack([loss, *more.values()]).sum()
        if self._logs_this_step():
            terms = {f"outer/{name}": value.detach() for name, value in terms.items()}
            for name, value in ({"outer/loss": loss.detach()} | terms | self._watched).items():
                self.log(name, value, prog_bar=name in ("outer/loss", "outer/accuracy"))
            self._watched.clear()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log gradient norms (before any clipping) at logging steps."""
        if self._logs_this_step():
            norms = {
                f"gradient/{name}": parameter.grad.norm()
                for name, parameter in self.require_synthetic().named_parameters()
                if parameter.grad is not None
            }
            self.log_dict(norms)

    def start_scoring(self) -> None:
        """Train a student on the current synthetic set: its accuracy is the run's score.

        Every validation starts from the same weights and order, so scores of one run compare.
        """
        seed = derive_seed(self.seed, "probe")
        strategy = default_strategy(self.require_facts().mirror)
        with torch.inference_mode(mode=False):  # Lightning is in it already, and parameters made in it cannot learn
            probe = self.build_network(seed, self.student_architecture).to(self.device)
            train_student(probe, self.distilled_set(), self.probe_recipe, strategy, seed)
        self._probe = (probe,)  # in a tuple: a registered network would enter the checkpoint

    def scored_logits(self, images: Tensor) -> Tensor:
        """Return the student's logits."""
        logits: Tensor = self._probe[0](images)
        return logits

    def rank_state(self) -> dict[str, Any]:
        """Return what this rank needs to go on and the module tree does not hold: plain tensors and numbers."""
        assert self._real_stream is not None
        return {"real": self._real_stream.state_dict()}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Continue exactly from :meth:`rank_state`."""
        assert self._real_stream is not None
        self._real_stream.load_state_dict(state["real"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what lies outside the module tree: the data's facts, and the state of every rank."""
        assert self.preprocessing is not None
        checkpoint[STATE_KEY] = {
            "method": type(self).__name__,
            "facts": self.require_facts().to_dict(),
            "preprocessing": self.preprocessing.state_dict(),
            "data_spec": self.data_spec,
            "ranks": gather_ranks(self.rank_state() if self._is_fitting() else {}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another configuration; else restore what lies outside the module tree.

        Raises:
            UserError: the checkpoint is not a distiller's, or method, settings, data or number of processes differ.
        """
        state = checkpoint.get(STATE_KEY)
        if state is None:
            raise UserError("the checkpoint was not written by a lightning_dd distiller")
        facts = DataFacts.from_dict(state["facts"])
        if self.facts is not None:
            if state["method"] != type(self).__name__:
                raise UserError(f"the checkpoint was written by {state['method']}, this run is {type(self).__name__}")
            check_settings(public_settings(checkpoint["hyper_parameters"]), public_settings(self.hparams))
            check_data(facts.to_dict(), self.facts.to_dict())
        self.facts = facts
        self.preprocessing = Preprocessing.from_state_dict(state["preprocessing"])
        self.data_spec = state["data_spec"]
        if self.synthetic is None:
            self._build_synthetic()
        if self._is_fitting():
            self.load_rank_state(take_rank(state["ranks"], self.trainer.global_rank, self.trainer.world_size))

    def initialise(self, train: Split) -> None:
        """Fill the new synthetic set for a first fit; every rank draws the same."""
        prepare_generator(self.require_synthetic(), self.real_data(), self.trainer, self.train_missing)
        self.require_synthetic().start(self.init, train, make_generator(self.seed, "init"))

    def real_data(self) -> RealData:
        """Return the run's DataModule.

        Raises:
            UserError: it is not a RealData.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RealData):
            raise UserError(f"a distiller needs a RealData module as its data, got {type(data).__name__}")
        return data

    def _build_synthetic(self) -> None:
        facts = self.require_facts()
        assert self.preprocessing is not None
        self.synthetic = build_synthetic(self.latents, self.ipc, facts, self.label_kind, self.preprocessing)

    def _is_fitting(self) -> bool:
        return self._real_stream is not None

    def _train(self) -> Split:
        train = self.real_data().train
        assert train is not None
        return train

    def _logs_this_step(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % every == 0

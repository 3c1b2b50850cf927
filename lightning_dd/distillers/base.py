"""The base of every distiller: it owns the synthetic set and the model pool; a subclass says what is minimised."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dd.checkpoint import check_data, check_settings, gather_ranks, public_settings, take_rank
from lightning_dd.data.augment import default_strategy
from lightning_dd.data.base import DataFacts, ImageTensors, RealData
from lightning_dd.data.distilled import DistilledSet, library_versions
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.stream import ShuffledStream
from lightning_dd.errors import UserError
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network
from lightning_dd.models.pool import ModelPool
from lightning_dd.recipe import Recipe, student_loss, train_student
from lightning_dd.scoring import ScoredModule
from lightning_dd.seeding import derive_seed, make_generator
from lightning_dd.synthetic.pixels import SyntheticSet, check_synthetic

ExtraLoss = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""From all synthetic images and labels, with graph, to named terms that are added to the outer loss."""

STATE_KEY = "lightning_dd"
"""Where a checkpoint keeps what lies outside the module tree."""


class Distiller(ScoredModule):
    """A LightningModule that owns learnable synthetic images and labels.

    Lightning's optimizer is the *outer* one, so ``global_step``, ``max_steps`` and TensorBoard's axis count outer
    steps. The networks of :attr:`pool` are trained between outer steps by a
    :class:`~lightning_dd.callbacks.PoolAlternation` callback, which owns the clock; they are in the checkpoint but not
    in the module tree, so DDP leaves every rank its own.

    A subclass must answer :meth:`outer_loss`; it may override :meth:`inner_loss`, :meth:`configure_pool`,
    :meth:`configure_optimizers` and :attr:`student_architecture`.

    Any distiller takes further terms: what is in :attr:`extra_losses` is added to the outer loss, and this is how
    MetaDD attaches without a line in a subclass.

    Args:
        ipc: images per class, at least 1.
        architecture: the network to distil with, as ``name`` or ``name:option=value,...``.
        labels: ``learned``, ``centred`` (FRePo's start values, fixed) or ``hard`` (one-hot, fixed).
        init: ``real`` starts from random training images, ``noise`` from a standard normal.
        lr: outer learning rate.
        real_batch_size: real images per outer step.
        pool_size: networks in the pool.
        max_age: inner steps after which a network is replaced.
        inner_lr: learning rate of the inner Adam.
        inner_batch_size: synthetic images per inner step, at most all of them.
        probe_steps: steps of the student trained for each validation score; ``None`` takes the recipe's table.
        probe_lr: its learning rate.
        seed: the run's one seed.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        ipc: int = 1,
        architecture: str = "conv",
        labels: str = "learned",
        init: str = "real",
        lr: float = 0.01,
        real_batch_size: int = 1024,
        pool_size: int = 10,
        max_age: int = 100,
        inner_lr: float = 3e-4,
        inner_batch_size: int = 1000,
        probe_steps: int | None = None,
        probe_lr: float = 3e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_synthetic(ipc, labels)
        if init not in ("real", "noise"):
            raise UserError(f"init must be 'real' or 'noise', got '{init}'")
        if lr <= 0 or inner_lr <= 0:
            raise UserError(f"lr and inner_lr must be positive, got {lr} and {inner_lr}")
        if real_batch_size < 1 or inner_batch_size < 1:
            raise UserError(
                f"real_batch_size and inner_batch_size must be at least 1, got {real_batch_size} and {inner_batch_size}"
            )
        self.ipc, self.architecture, self.label_kind, self.init = ipc, architecture, labels, init
        self.lr, self.real_batch_size = lr, real_batch_size
        self.pool_size, self.max_age = pool_size, max_age
        self.inner_lr, self.inner_batch_size = inner_lr, inner_batch_size
        self.probe_recipe = Recipe(steps=probe_steps, lr=probe_lr)
        self.seed = seed
        self.synthetic: SyntheticSet | None = None
        self.facts: DataFacts | None = None
        self.preprocessing: Preprocessing | None = None
        self.data_spec: dict[str, Any] = {}
        self.pool: ModelPool | None = None
        self.extra_losses: list[ExtraLoss] = []
        self._watched: dict[str, Tensor] = {}

    @abstractmethod
    def outer_loss(self, network: Network, images: Tensor, labels: Tensor, real: ImageTensors) -> dict[str, Tensor]:
        """Return the named terms whose sum an outer step minimises.

        Args:
            network: the pool's current network: inference mode, parameters without gradient.
            images: synthetic images ``(n, C, H, W)``, normalised, with graph.
            labels: synthetic labels ``(n, num_classes)``, with graph where learned.
            real: a batch of real images ``(real_batch_size, C, H, W)``, normalised, and their classes.
        """

    def inner_loss(self, network: Network) -> Tensor:
        """Return the loss of one inner step: by default the network learns the current synthetic set.

        A batch is drawn without replacement; nothing is augmented, and no gradient reaches the synthetic set.
        """
        synthetic = self.require_synthetic()
        images, labels = (part.detach() for part in synthetic())
        if self.inner_batch_size < len(synthetic):
            rows = torch.randperm(len(synthetic), generator=self._inner_generator, device=images.device)
            images, labels = images[rows[: self.inner_batch_size]], labels[rows[: self.inner_batch_size]]
        images = images.contiguous(memory_format=torch.channels_last)
        return student_loss(network(images), labels, self.label_kind)

    def configure_pool(self, generator: torch.Generator, device: torch.device) -> ModelPool:
        """Return the model pool; called once per rank when a fit begins."""
        return ModelPool(
            build=self.build_network,
            build_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=self.inner_lr, fused=True),
            size=self.pool_size,
            max_age=self.max_age,
            generator=generator,
            device=device,
        )

    def configure_optimizers(self) -> Any:
        """Return the outer optimizer: Adam on whatever the synthetic set learns."""
        return torch.optim.Adam(self.require_synthetic().parameters(), lr=self.lr)

    @property
    def student_architecture(self) -> str:
        """The architecture students of this set are trained with when they stand for "the same" one."""
        return self.architecture

    def build_network(self, seed: int, architecture: str | None = None) -> Network:
        """Build a fresh network for this data from a seed, with the distilling architecture unless another is named."""
        facts = self.require_facts()
        return build_network(architecture or self.architecture, facts.num_classes, facts.image_shape, seed)

    def watch(self, **values: Tensor) -> None:
        """Hand scalar diagnostics to the logger; they are read only at logging steps, so they cost nothing else."""
        self._watched.update(values)

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

    def require_pool(self) -> ModelPool:
        """Return the model pool, which exists while fitting."""
        if self.pool is None:
            raise RuntimeError("the model pool exists only while fitting")
        return self.pool

    def distilled_set(self, **training: Any) -> DistilledSet:
        """Return the current synthetic set as a file-ready object.

        Args:
            training: facts on the run to keep beside it (outer step, validation score).
        """
        synthetic, facts = self.require_synthetic(), self.require_facts()
        assert self.preprocessing is not None
        images, labels = (part.detach().cpu().clone().contiguous() for part in synthetic())
        return DistilledSet(
            images=images,
            labels=labels,
            classes=synthetic.classes.cpu(),
            label_kind=self.label_kind,
            class_names=facts.class_names,
            preprocessing=self.preprocessing,
            data={"name": facts.name, "spec": self.data_spec, "fingerprint": facts.fingerprint},
            method=type(self).__name__,
            config={**public_settings(self.hparams), "student_architecture": self.student_architecture},
            training={"seed": self.seed, "versions": library_versions(), **training},
        )

    def setup(self, stage: str) -> None:
        """Take the facts from the DataModule; for a first fit, draw the initial images and build the pool.

        Lightning restores a checkpoint after this hook, so a resumed run overwrites what is initialised here.

        Raises:
            UserError: the data does not fit the settings (too few images of a class, a network too deep).
        """
        data = self._real_data()
        self.facts, self.preprocessing, self.data_spec = data.facts, data.preprocessing, data.spec()
        assert data.train is not None
        device = self.trainer.strategy.root_device
        self.make_accuracy(self.facts.num_classes)
        if self.synthetic is None:
            self._build_synthetic()
            self._initialise(data.train)
        if stage != "fit":
            return
        rank = self.trainer.global_rank
        if self.pool is None:
            self.pool = self.configure_pool(make_generator(self.seed, "pool", rank), device)
        order = make_generator(self.seed, "real", rank, device=data.train.images.device)
        self._real_stream = ShuffledStream(len(data.train.labels), self.real_batch_size, order)
        self._inner_generator = make_generator(self.seed, "inner", rank, device=device)

    def on_fit_start(self) -> None:
        """Refuse a Trainer whose pool would never be trained."""
        if not any(hasattr(callback, "inner_steps_at") for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("a distiller needs PoolAlternation() (from lightning_dd.callbacks) among trainer.callbacks")

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One outer step; ``batch`` only counts."""
        images, labels = self.require_synthetic()()
        terms = self.outer_loss(self.require_pool().network, images, labels, self._draw_real())
        for extra in self.extra_losses:
            terms = terms | extra(images, labels)
        loss = torch.stack(list(terms.values())).sum()
        if self._logs_this_step():
            terms = {f"outer/{name}": value.detach() for name, value in terms.items()}
            for name, value in ({"outer/loss": loss.detach()} | terms | self._watched).items():
                self.log(name, value, prog_bar=name in ("outer/loss", "outer/accuracy"))
            self.log("pool/age", float(self.require_pool().current.age))
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

    def inner_step(self) -> None:
        """One inner step of the current network; called by the callback that owns the clock."""
        with self.trainer.precision_plugin.train_step_context():
            self.require_pool().advance(self.inner_loss)

    def start_scoring(self) -> None:
        """Train a student on the current synthetic set: its accuracy is the run's score.

        Every validation starts from the same weights and order, so scores of one run compare.
        """
        synthetic, facts = self.require_synthetic(), self.require_facts()
        seed = derive_seed(self.seed, "probe")
        with torch.inference_mode(mode=False):  # Lightning is in it already, and parameters made in it cannot learn
            probe = self.build_network(seed, self.student_architecture).to(self.device)
            images, labels = (part.detach().clone() for part in synthetic())
            strategy = default_strategy(facts.name)
            train_student(probe, images, labels, self.label_kind, self.probe_recipe, strategy, seed)
        self._probe = (probe,)  # in a tuple: a registered network would enter the checkpoint

    def scored_logits(self, images: Tensor) -> Tensor:
        """Return the student's logits."""
        logits: Tensor = self._probe[0](images)
        return logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what lies outside the module tree: the data's facts, and pool and generators of every rank."""
        assert self.preprocessing is not None
        own = {}
        if self.pool is not None:
            own = {
                "pool": self.pool.state_dict(),
                "real": self._real_stream.state_dict(),
                "inner": self._inner_generator.get_state(),
            }
        checkpoint[STATE_KEY] = {
            "method": type(self).__name__,
            "facts": self.require_facts().to_dict(),
            "preprocessing": self.preprocessing.state_dict(),
            "data_spec": self.data_spec,
            "ranks": gather_ranks(own),
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
            check_data(facts, self.facts)
        self.facts = facts
        self.preprocessing = Preprocessing.from_state_dict(state["preprocessing"])
        self.data_spec = state["data_spec"]
        if self.synthetic is None:
            self._build_synthetic()
        if self.pool is not None:
            own = take_rank(state["ranks"], self.trainer.global_rank, self.trainer.world_size)
            self.pool.load_state_dict(own["pool"])
            self._real_stream.load_state_dict(own["real"])
            self._inner_generator.set_state(own["inner"].cpu())

    def _real_data(self) -> RealData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RealData):
            raise UserError(f"a distiller needs a RealData module as its data, got {type(data).__name__}")
        return data

    def _build_synthetic(self) -> None:
        facts = self.require_facts()
        self.synthetic = SyntheticSet(self.ipc, facts.num_classes, facts.image_shape, self.label_kind)

    def _initialise(self, train: ImageTensors) -> None:
        generator = make_generator(self.seed, "init")
        synthetic = self.require_synthetic()
        if self.init == "real":
            synthetic.init_real(train.images, train.labels, generator)
        else:
            synthetic.init_noise(generator)

    def _draw_real(self) -> ImageTensors:
        train = self._real_data().train
        assert train is not None
        rows = self._real_stream.next()
        return ImageTensors(train.images[rows].to(self.device), train.labels[rows].to(self.device))

    def _logs_this_step(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % every == 0

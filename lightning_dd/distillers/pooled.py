"""Distillers that look through a pool of partly trained networks, and the clock that trains the pool."""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dd.data.images import Batch
from lightning_dd.data.sampling import ShuffledStream, next_batch
from lightning_dd.distillers.base import Distiller
from lightning_dd.losses.labels import student_loss
from lightning_dd.models.interface import Network
from lightning_dd.models.pool import ModelPool, perturbed
from lightning_dd.utils.arguments import RemembersArguments
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.seeding import make_generator


class PoolDistiller(Distiller):
    """A distiller with a pool of networks, which are trained between outer steps.

    A :class:`~lightning_dd.callbacks.PoolAlternation` callback owns the clock of the inner steps; it is there by itself
    unless the Trainer was given one. The networks are in the checkpoint but not in the module tree, so DDP leaves every
    rank its own.

    A subclass must answer :meth:`outer_loss`; it may override :meth:`draw_real`, :meth:`inner_loss`,
    :meth:`configure_inner_optimizer` and :meth:`configure_pool`.

    Args:
        real_batch_size: real images per outer step.
        pool_size: networks in the pool.
        lifetime: inner steps a network takes before it is replaced; 0 gives every outer step a fresh one. (FRePo's
            code replaces a network whose age exceeds 100.)
        inner_lr: learning rate of the inner optimizer.
        inner_batch_size: synthetic images per inner step, drawn without replacement, at most all of them.
        balance: where several architectures are mixed, divide the outer loss by the size that is usual for the
            current one's (:meth:`~lightning_dd.models.pool.ModelPool.balanced`).
        mixing_start: outer steps in which fresh networks are of the main architecture only, where several are mixed:
            unlike ones that look from the first step on can keep a set from converging.
        perturb: noise on a network's weights while it looks, relative to their size
            (:func:`~lightning_dd.models.pool.perturbed`); inner steps train it without.
        **kwargs: see :class:`Distiller`.

    Attributes:
        pool: the model pool; there while fitting.
    """

    pool: ModelPool

    def __init__(
        self,
        real_batch_size: int = 1024,
        pool_size: int = 10,
        lifetime: int = 101,
        inner_lr: float = 3e-4,
        inner_batch_size: int = 1000,
        balance: bool = True,
        mixing_start: int = 0,
        perturb: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_range("at least 0", mixing_start=mixing_start, perturb=perturb)
        if mixing_start and len(self.networks.names) == 1:
            raise UserError(f"mixing_start needs several architectures to mix, got '{self.architecture}'")
        check_range("at least 1", real_batch_size=real_batch_size, inner_batch_size=inner_batch_size)
        check_range("positive", inner_lr=inner_lr)
        self.real_batch_size, self.pool_size, self.lifetime = real_batch_size, pool_size, lifetime
        self.inner_lr, self.inner_batch_size, self.balance = inner_lr, inner_batch_size, balance
        self.mixing_start, self.perturb = mixing_start, perturb

    @abstractmethod
    def outer_loss(self, network: Network, images: Tensor, labels: Tensor, real: Batch) -> dict[str, Tensor]:
        """Return the named terms whose sum an outer step minimises.

        Args:
            network: the pool's current network: inference mode, parameters without gradient.
            images: synthetic images ``(n, C, H, W)``, normalised, with graph.
            labels: synthetic labels ``(n, num_classes)``, with graph where learned.
            real: what :meth:`draw_real` returned: images ``(B, C, H, W)``, normalised, and their classes.
        """

    def outer_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return :meth:`outer_loss` on the current network and a real batch."""
        self.watch(**{"pool/age": torch.tensor(float(self.pool.current.age))})
        with self.perturbed(self.network):
            terms = self.outer_loss(self.network, images, labels, self.draw_real())
        return self.pool.balanced(terms) if self.balance else terms

    def perturbed(self, network: Network, place: int = 0) -> AbstractContextManager[None]:
        """Return a block in which a network, the ``place``-th of this step, looks with the noise asked for."""
        if self.perturb == 0:
            return nullcontext()
        return perturbed(network, self.perturb, self.step_generator("perturb", place, device=self.device))

    def draw_real(self) -> Batch:
        """Draw the next ``real_batch_size`` training images of a shuffled stream: ``(B, C, H, W)``, and classes."""
        return next_batch(self.task.train, self._real_stream, self.device)

    @property
    def inner_steps(self) -> int:
        """Inner steps that follow an outer step, for a clock that has no number of its own."""
        return 1

    def inner_loss(self, network: Network) -> Tensor:
        """Return the loss of one inner step: by default the network learns the current synthetic set."""
        images, labels = self.draw_synthetic()
        return student_loss(network(images.contiguous(memory_format=torch.channels_last)), labels, self.label_kind)

    def draw_synthetic(self) -> tuple[Tensor, Tensor]:
        """Draw ``inner_batch_size`` synthetic images and their labels, without graph."""
        with torch.no_grad():  # a generator's graph would be for nothing
            images, labels = (part.detach() for part in self.synthetic())
        if self.inner_batch_size >= len(images):
            return images, labels
        rows = self.draw_inner_rows(len(images), images.device)
        return images[rows], labels[rows]

    def draw_inner_rows(self, count: int, device: torch.device) -> Tensor:
        """Draw which of ``count`` synthetic images an inner step learns, int64: without replacement."""
        return torch.randperm(count, generator=self._inner_generator, device=device)[: self.inner_batch_size]

    def configure_pool(self, generator: torch.Generator, device: torch.device) -> ModelPool:
        """Return the model pool; called once per rank when a fit begins."""
        return ModelPool(
            build=self.pool_network,
            build_optimizer=self.configure_inner_optimizer,
            mixture=self.networks,
            size=self.pool_size,
            lifetime=self.lifetime,
            generator=generator,
            device=device,
            mixed=self.mixing_start == 0,
        )

    def pool_network(self, seed: int, architecture: str) -> Network:
        """Build a network that joins the pool, from a seed: a fresh one."""
        return self.build_network(seed, architecture)

    def configure_inner_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of one of the pool's networks: Adam."""
        return torch.optim.Adam(parameters, lr=self.inner_lr, fused=True)

    @property
    def network(self) -> Network:
        """The pool's current network."""
        return self.pool.network

    def configure_callbacks(self) -> list[Callback]:
        """Bring the clock of the inner steps, unless the Trainer has one."""
        own = any(isinstance(callback, PoolAlternation) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if own else [PoolAlternation()]

    def setup(self, stage: str) -> None:
        """Build the pool as well."""
        super().setup(stage)
        if stage != "fit":
            return
        rank, device, labels = self.trainer.global_rank, self.task.device, self.task.train.labels
        order = make_generator(self.seed, "real", rank, device=labels.device)
        self._real_stream = ShuffledStream(len(labels), self.real_batch_size, order)
        if not hasattr(self, "pool"):
            self.pool = self.configure_pool(make_generator(self.seed, "pool", rank), device)
        self._inner_generator = make_generator(self.seed, "inner", rank, device=device)

    def inner_step(self) -> bool:
        """Run one inner step of the current network; return whether it was trained.

        Otherwise it was too old, and a fresh one stands in its place.
        """
        self.pool.mixed = self.trainer.global_step >= self.mixing_start
        with self.trainer.precision_plugin.train_step_context():
            return self.pool.advance(self.inner_loss)

    def rank_state(self) -> dict[str, Any]:
        """Add the real stream, the pool and the generator of the inner steps."""
        return {
            **super().rank_state(),
            "real": self._real_stream.state_dict(),
            "pool": self.pool.state_dict(),
            "inner": self._inner_generator.get_state(),
        }

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        super().load_rank_state(state)
        self._real_stream.load_state_dict(state["real"])
        self.pool.load_state_dict(state["pool"])
        self._inner_generator.set_state(state["inner"].cpu())


class PoolAlternation(Callback, RemembersArguments):
    """After an outer step, train the network it used, then draw the next one.

    This callback owns *when*: how many inner steps follow which outer step. The pool owns *how* a network is
    trained and replaced, the distiller *what* it learns. For another rhythm override :meth:`inner_steps_at`. A
    distiller without a pool is left alone.

    Args:
        inner_steps: inner steps after an outer step that has any; ``None`` asks the distiller (FRePo takes 1).
        every: outer steps between inner trainings; the next network is drawn after every outer step all the same.

    Raises:
        UserError: ``inner_steps`` is negative or ``every`` is below 1.
    """

    def __init__(self, inner_steps: int | None = None, every: int = 1) -> None:
        check_range("at least 0", "PoolAlternation.", inner_steps=inner_steps)
        check_range("at least 1", "PoolAlternation.", every=every)
        self.inner_steps = inner_steps
        self.every = every
        self._steps = 0
        self._seen = 0

    def inner_steps_at(self, outer_step: int) -> int:
        """Return how many inner steps follow outer step ``outer_step``, counted from 1."""
        return self._steps if outer_step % self.every == 0 else 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the count where the run stands."""
        self._seen = trainer.global_step
        if isinstance(pl_module, PoolDistiller):
            self._steps = pl_module.inner_steps if self.inner_steps is None else self.inner_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the inner steps due now; a batch that only accumulated gradients is no outer step."""
        if not isinstance(pl_module, PoolDistiller) or trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        for _ in range(self.inner_steps_at(self._seen)):
            if not pl_module.inner_step():  # a fresh network waits for its first outer step
                break
        pl_module.pool.select()

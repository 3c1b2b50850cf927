"""MetaDD for any distiller: the invariance term of frozen architectures, added to the outer loss when it is due."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dd.augment.frepo import Augmentation, default_strategy
from lightning_dd.data.base import RealData
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.distillers.base import Distiller, ExtraLoss
from lightning_dd.losses.attach import attach_gradients
from lightning_dd.losses.gathered import MetaLoss, gathered_loss
from lightning_dd.losses.meta_options import Architecture, MetaOptions
from lightning_dd.losses.steadiness import Steadiness
from lightning_dd.pretrained import (
    ArchitectureRecipe,
    accelerator_of,
    first_process_first,
    trained_architecture,
)
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator

_log = logging.getLogger(__name__)


class MetaDD(Callback):
    """Add MetaDD's architecture-invariant term to the outer loss of any distiller (arXiv 2410.05103, our reading).

    M architectures are trained on the real train split once, frozen, cached and reused. On the outer steps that are
    due, the synthetic images are shown to some or all of them: the variance of their class-activation maps, their
    cross-entropy on the synthetic labels and their divergence from a common prediction join the outer loss. The
    gradient is exact and gathered one architecture at a time. This callback owns *when*, *on how many rows* and *to
    whom*.

    Under DDP every rank takes its share of the rows drawn for a step. Architectures see their own preprocessing:
    images of a whitened set are un-whitened for them.

    Args:
        architectures: at least 2 names of the factory; keep them apart from those you evaluate as unseen.
        weight: of the whole term in the outer loss.
        relative: take ``weight`` relative to the method: the term's gradient by the images then has ``weight`` times
            the norm of the method's own, so that one setting suits objectives of any scale.
        steady: take that norm of the steady part of the method's gradient alone, as
            :class:`~lightning_dd.losses.steadiness.Steadiness` estimates it. The gradient of a method with other
            networks in every step (DM, FRePo) points elsewhere each time; the term, which does not, would have the
            upper hand at the same norm.
        move_labels: let the term move learned labels too. They are small beside the images: a relative weight, which
            is set by the images' gradient, can move them a hundred times as far as the method itself does.
        variance: weight of the maps' variance.
        cross_entropy: weight of the cross-entropy.
        kl: weight of the divergence from the common prediction.
        positivity: weight of the term that wants maps high inside the meta mask.
        temperature: of the divergence.
        kl_direction: ``reverse`` is KL(architecture || common), ``forward`` the other.
        consensus: the common prediction: ``ensemble`` mean, or the ``distiller``'s current network.
        threshold: from where on a map value is high.
        cam: ``gradcam``, ``attention`` (transformers) or ``auto``.
        detach_weights: take Grad-CAM's weights for constant; false is the exact second order.
        grid: side of the grid maps are compared on.
        every: outer steps between two that carry the term.
        start: outer steps before the first that carries it.
        warmup: outer steps over which ``weight`` then rises linearly.
        rows: synthetic images per step, drawn anew each time; ``None`` takes all.
        per_step: architectures that look in a step, at least 2, drawn anew each time; ``None`` takes all. The time of
            a step then does not grow with their number.
        augment: operations joined by ``_``, one of which is drawn per step and applied before the architectures look;
            ``auto`` is FRePo's family for the data, ``none`` is none.
        train_steps: training steps of an architecture on the real data.
        train_lr: its peak learning rate.
        files: files of trained architectures to use instead, by architecture.
        layers: modules to take the map from, by architecture; the others are found.
        seed: of the architectures; kept apart from the run's seed, so that seeds of a run share them.

    Raises:
        UserError: a setting is out of range, or an architecture is unusable.
    """

    def __init__(
        self,
        architectures: list[str],
        weight: float = 1.0,
        relative: bool = True,
        steady: bool = True,
        move_labels: bool = False,
        variance: float = 1.0,
        cross_entropy: float = 1.0,
        kl: float = 1.0,
        positivity: float = 0.0,
        temperature: float = 1.0,
        kl_direction: str = "reverse",
        consensus: str = "ensemble",
        threshold: float = 0.5,
        cam: str = "auto",
        detach_weights: bool = True,
        grid: int = 14,
        every: int = 10,
        start: int = 0,
        warmup: int = 0,
        rows: int | None = None,
        per_step: int | None = 2,
        augment: str = "auto",
        train_steps: int = 1000,
        train_lr: float = 2e-3,
        files: dict[str, str] | None = None,
        layers: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        if len(architectures) < 2:
            raise UserError(f"metadd needs at least 2 architectures to compare, got {len(architectures)}")
        if weight < 0 or every < 1 or start < 0 or warmup < 0 or (rows is not None and rows < 1):
            raise UserError(
                "metadd needs weight >= 0, every >= 1, start >= 0, warmup >= 0 and rows >= 1 (or none), got "
                f"{weight}, {every}, {start}, {warmup} and {rows}"
            )
        if per_step is not None and not 2 <= per_step <= len(architectures):
            raise UserError(
                f"metadd.per_step must be from 2 to the number of architectures, {len(architectures)}, or none, "
                f"got {per_step}"
            )
        self.names = architectures
        self.options = MetaOptions(
            variance=variance,
            cross_entropy=cross_entropy,
            kl=kl,
            positivity=positivity,
            temperature=temperature,
            kl_direction=kl_direction,
            consensus=consensus,
            threshold=threshold,
            cam=cam,
            detach_weights=detach_weights,
            grid=grid,
        )
        self.relative, self.move_labels = relative, move_labels
        self.steadiness = Steadiness() if steady else None
        self.weight, self.every, self.start, self.warmup = weight, every, start, warmup
        self.rows, self.per_step = rows, per_step
        self.augment, self.augmentation = augment, Augmentation("none" if augment == "auto" else augment)
        self.recipe = ArchitectureRecipe(steps=train_steps, lr=train_lr)
        self.files, self.layers, self.seed = files or {}, layers or {}, seed
        for setting, given in (("files", self.files), ("layers", self.layers)):
            if stray := set(given) - set(architectures):
                raise UserError(f"metadd.{setting} names '{min(stray)}', which is none of its architectures")
        self.architectures: list[Architecture] = []
        self.accuracies: dict[str, float] = {}
        self._term: ExtraLoss | None = None

    def weight_at(self, outer_step: int) -> float:
        """Return the term's weight at outer step ``outer_step``, counted from 0; 0 where it is not due.

        Override this for another rhythm.
        """
        if outer_step < self.start or (outer_step - self.start) % self.every:
            return 0.0
        return self.weight * min(1.0, (outer_step - self.start + 1) / max(1, self.warmup))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Train or load the architectures before the fit."""
        if stage != "fit":
            return
        self.steadiness = Steadiness() if self.steadiness else None  # of this fit; a checkpoint's is restored later
        if not isinstance(pl_module, Distiller):
            raise UserError(f"metadd attaches to a distiller, got {type(pl_module).__name__}")
        if not pl_module.learns:
            raise UserError(
                f"metadd has nothing to act on: {type(pl_module).__name__} selects real images and learns none"
            )
        data = getattr(trainer, "datamodule", None)
        if self.architectures or not isinstance(data, RealData):
            return
        if data.train is None or data.val is None or data.preprocessing is None:
            raise UserError("metadd needs a validation split to judge its architectures: set data.val_fraction above 0")
        if self.augment == "auto":
            self.augmentation = Augmentation(default_strategy(data.mirror))
        adapt = own_preprocessing(data.preprocessing)
        train, val = data.train, data.val
        if adapt is not None:
            train, val = (split.through(adapt.standardised) for split in (train, val))
        device = trainer.strategy.root_device
        make = partial(
            trained_architecture,
            train=train,
            val=val,
            facts=data.facts,
            recipe=self.recipe,
            seed=self.seed,
            accelerator=accelerator_of(trainer),
        )
        with first_process_first(trainer, "architectures"):
            for name in self.names:
                trained = make(name, file=self.files.get(name))
                network = trained.network.to(device).to(memory_format=torch.channels_last)
                self.architectures.append(Architecture(network, adapt, self.layers.get(name), name=name))
                self.accuracies[name] = trained.accuracy
                _log.info("metadd: %s has %.1f %% validation accuracy", name, 100 * trained.accuracy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the term, and log how good the architectures are."""
        assert isinstance(pl_module, Distiller)
        self._term = partial(self.terms, trainer, pl_module)
        pl_module.extra_losses.append(self._term)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"metadd/accuracy/{name}": value for name, value in self.accuracies.items()}, trainer.global_step
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the term."""
        self._detach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the term from a run that broke off."""
        self._detach(pl_module)

    def _detach(self, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Distiller) and self._term in pl_module.extra_losses:
            pl_module.extra_losses.remove(self._term)
        self._term = None

    def terms(
        self, trainer: Trainer, distiller: Distiller, images: Tensor, labels: Tensor, own_loss: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the method's own loss, and ``{"metadd": weighted loss}`` if the term is due at this outer step."""
        weight = self.weight_at(trainer.global_step)
        if weight == 0:
            return own_loss, {}
        rows = self._draw(trainer, len(images))
        labels = labels if self.move_labels else labels.detach()
        few, few_labels = (images, labels) if rows is None else (images[rows], labels[rows])
        consensus = distiller.network(few.detach()) if self.options.consensus == "distiller" else None
        seen = self.augmentation(few, make_generator(self.seed, "augment", trainer.global_step))
        result = self.measure(seen, few_labels, distiller.label_kind, consensus, self.looking(trainer.global_step))
        factor: Tensor | float = weight
        watched = {**result.terms, "loss": result.loss.detach()}
        if self.relative:
            own_loss, own = self._own(trainer, distiller, images, own_loss)
            own, term = _mean(trainer, own), _mean(trainer, _gradient(result.loss, images))
            factor = weight * own.norm() / term.norm().clamp(min=1e-12)
            if self.steadiness:
                watched["steady"] = self.steadiness.take(own)
                factor = factor * watched["steady"]
        distiller.watch(**{f"metadd/{name}": value for name, value in watched.items()})
        return own_loss, {"metadd": factor * result.loss}

    def _own(self, trainer: Trainer, distiller: Distiller, images: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the method's own loss, differentiated already where that may be, and its gradient by the images."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:  # float16 must go back with its scale
            return loss, _gradient(loss, images)
        return _taken(loss, images, [parameter for parameter in distiller.parameters() if parameter.requires_grad])

    def measure(
        self,
        images: Tensor,
        labels: Tensor,
        label_kind: str,
        consensus: Tensor | None = None,
        architectures: Sequence[Architecture] | None = None,
    ) -> MetaLoss:
        """Return loss, terms and maps of images ``(N, C, H, W)`` in the data's normalised space.

        Those of all architectures, unless told which.
        """
        looking = self.architectures if architectures is None else architectures
        return gathered_loss(looking, images, labels, label_kind, self.options, consensus)

    def looking(self, outer_step: int) -> list[Architecture]:
        """Return the architectures that look in an outer step: on every rank, and after a restart, the same."""
        if self.per_step is None:
            return self.architectures
        drawn = torch.randperm(
            len(self.architectures), generator=make_generator(self.seed, "architectures", outer_step)
        )
        return [self.architectures[index] for index in drawn[: self.per_step].tolist()]

    def _draw(self, trainer: Trainer, count: int) -> Tensor | None:
        """Rows of this step and rank: a function of seed and step alone, so a resumed run is exact."""
        rank, world = trainer.global_rank, trainer.world_size
        if self.rows is None or self.rows >= count:
            return None if world == 1 else torch.arange(count)[rank::world]
        drawn = torch.randperm(count, generator=make_generator(self.seed, "rows", trainer.global_step))[: self.rows]
        return drawn[rank::world]

    def state_dict(self) -> dict[str, Any]:
        """Keep the settings, so that a run is not continued with others, and what is known of the method's gradient."""
        clock = (self.weight, self.relative, self.steadiness is not None, self.every, self.start, self.warmup)
        seen = (self.rows, self.per_step, self.augment, self.move_labels)
        return {
            "settings": repr((self.names, self.options, clock, seen)),
            "steadiness": self.steadiness and self.steadiness.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse other settings than the checkpoint's.

        Raises:
            UserError: they differ.
        """
        here, there = MetaDD.state_dict(self)["settings"], state_dict["settings"]
        if there != here:
            raise UserError(f"the checkpoint is of another metadd setting: {there} there, {here} here")
        if self.steadiness:
            self.steadiness.load_state_dict(state_dict["steadiness"])


def _gradient(loss: Tensor, images: Tensor) -> Tensor:
    gradient: Tensor = torch.autograd.grad(loss, images, retain_graph=True)[0]
    return gradient


def _mean(trainer: Trainer, gradient: Tensor) -> Tensor:
    """The mean over processes, which DDP will make of their gradients; in float32."""
    return cast(Tensor, trainer.strategy.reduce(gradient.float().clone(), reduce_op="mean"))  # in place under DDP


def _taken(loss: Tensor, images: Tensor, learned: list[torch.nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Differentiate a loss now; return it with its gradients attached, and the one by the images.

    The latter is known before the backward pass this way, and the loss's graph is gone through once, not twice. It is
    kept, for the part from what is learned to the images is the term's as well.
    """
    by_images, *gradients = torch.autograd.grad(loss, [images, *learned], allow_unused=True, retain_graph=True)
    return attach_gradients(loss.detach(), learned, gradients), by_images


class _Adapt:
    """From the data's normalised space to channel-standardised images."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.whitened = preprocessing
        self.standardised = Preprocessing(preprocessing.mean, preprocessing.std)

    def __call__(self, images: Tensor) -> Tensor:
        return self.standardised(self.whitened.inverse(images))


def own_preprocessing(preprocessing: Preprocessing) -> _Adapt | None:
    """Return the map from a set's images to those its architectures see; ``None`` where they are the same."""
    return _Adapt(preprocessing) if preprocessing.kind == "zca" else None

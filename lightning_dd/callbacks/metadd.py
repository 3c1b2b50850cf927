"""MetaDD for any distiller: the invariance term of frozen architectures, added to the outer loss when it is due."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_dd.augment.frepo import Augmentation
from lightning_dd.callbacks.architectures import ArchitectureTerm, Look
from lightning_dd.data.base import RealData
from lightning_dd.distillers.base import Distiller
from lightning_dd.losses.gradients import SteadyShare, attach_gradients
from lightning_dd.losses.meta_features import focus_weights, shared_map
from lightning_dd.losses.metadd import MetaOptions
from lightning_dd.losses.metadd_gradient import Architecture, MetaLoss, gathered_loss
from lightning_dd.models.factory import Architectures
from lightning_dd.pretrained import ClassifierRecipe
from lightning_dd.utils.errors import UserError, check_range, unknown_name
from lightning_dd.utils.seeding import make_generator
from lightning_dd.utils.trainer import steps_to_log

SCALES = ("steady", "norm", "absolute")


class MetaDD(ArchitectureTerm):
    """Add MetaDD's architecture-invariant term to the outer loss of any distiller (arXiv 2410.05103, our reading).

    M architectures are trained on the real train split once, frozen, cached and reused. On the outer steps that are
    due, the synthetic images are shown to some or all of them: the variance of their class-activation maps, their
    cross-entropy on the synthetic labels and their divergence from a common prediction join the outer loss. The
    gradient is exact and gathered one architecture at a time. This callback owns *when*, *on how many rows* and *to
    whom*.

    Under DDP every rank takes its share of the rows drawn for a step. Architectures, and the method's own network where
    it is the consensus, see one view of the images, each in its own preprocessing: images of a whitened set are
    un-whitened for the architectures.

    CLoM's form (Lu et al. 2023, arXiv 2310.03295) is ``loss: {variance: 0, kl: 0}``, ``per_step: 1``, ``every: 1``,
    ``scale: absolute``, ``augment: none``: in each step the cross-entropy of one architecture, drawn anew, and no map.
    Its weights on CIFAR-10 at 10 and 50 images per class are 2000 and 1000 for DM, 1000 and 5000 for DC, 5000 and 1000
    for DSA.

    Args:
        architectures: names of the factory, or names with probabilities; keep them apart from those you evaluate as
            unseen.
        loss: weights and switches of the terms.
        weight: of the whole term in the outer loss, in units of ``scale``.
        scale: what a weight of 1 stands for. ``absolute`` is the loss as it is. ``norm`` gives the term's gradient by
            the images the norm of the method's own, so that one weight suits objectives of any scale. ``steady`` takes
            the steady part of that norm alone, as :class:`~lightning_dd.losses.gradients.SteadyShare` estimates it:
            a method that looks through other networks in every step (DM, FRePo) has a gradient that points elsewhere
            each time, and a term whose gradient does not would dominate it at the same norm.
        move_labels: let the term move learned labels too. They are small beside the images: a relative weight, which
            is set by the images' gradient, can move them a hundred times as far as the method itself does.
        every: outer steps between two that carry the term.
        start: outer steps before the first that carries it.
        warmup: outer steps over which ``weight`` then rises linearly.
        rows: synthetic images per step, drawn anew each time; ``None`` takes all.
        per_step: architectures that look in a step, drawn anew each time by their probabilities; ``None`` takes all.
            The time of a step then does not grow with their number. Terms that compare architectures need 2.
        augment: a strategy of :class:`~lightning_dd.augment.frepo.Augmentation`, of which one operation is drawn per
            step and applied before the architectures look; ``auto`` is FRePo's family for the data, ``none`` is none.
        training: how an architecture is trained on the real data.
        looks: exceptions for single architectures, by name.
        seed: of the architectures; kept apart from the run's seed, so that seeds of a run share them.
        views: augmented ones of each image that the architectures are shown in a step, one operation drawn for each.
        focus: from 0 to 1: how far the method's own gradient by the images is held to the meta features of all of them,
            on the steps that are due (:func:`~lightning_dd.losses.meta_features.focus_weights`), so mostly with
            ``every: 1``: a mask on the method's loss in place of a penalty, or beside it; ``weight: 0`` leaves the mask
            alone. It costs a forward pass of each architecture that looks. One that looks alone is EDF's form. An
            optimizer that scales every pixel's step by itself, as Adam does for SRe2L and FRePo, undoes most of it;
            that of DM, DC, DSA and MTT does not.

    Raises:
        UserError: a setting is out of range, or an architecture is unusable.
    """

    def __init__(
        self,
        architectures: Architectures,
        loss: MetaOptions = MetaOptions(),  # noqa: B008  (frozen)
        weight: float = 1.0,
        scale: str = "steady",
        move_labels: bool = False,
        every: int = 10,
        start: int = 0,
        warmup: int = 0,
        rows: int | None = None,
        per_step: int | None = 2,
        augment: str = "auto",
        training: ClassifierRecipe = ClassifierRecipe(),  # noqa: B008  (frozen)
        looks: dict[str, Look] | None = None,
        seed: int = 0,
        views: int = 1,
        focus: float = 0.0,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_range("at least 0", "metadd.", weight=weight)
        check_range("at least 1", "metadd.", rows=rows, views=views)
        check_range("in [0, 1]", "metadd.", focus=focus)
        if scale not in SCALES:
            raise unknown_name("metadd scale", scale, SCALES)
        if views > 1 and augment == "none":
            raise UserError(
                f"metadd.views={views} are all the same without an augmentation: metadd.augment must be auto"
            )
        super().__init__(given, architectures, loss.fewest, every, start, warmup, per_step, training, looks, seed)
        self.options, self.weight, self.scale, self.move_labels = loss, weight, scale, move_labels
        self.rows, self.views, self.augment, self.augmentation = rows, views, augment, Augmentation(augment)
        self.focus, self.share = focus, SteadyShare()

    def weight_at(self, outer_step: int) -> float:
        """Return the term's weight at outer step ``outer_step``, counted from 0; 0 where it is not due."""
        return self.weight * self.share_at(outer_step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Train or load the architectures before the fit."""
        super().setup(trainer, pl_module, stage)
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, RealData):
            self.share = SteadyShare()  # of this fit; a checkpoint's is restored later
            self.augmentation = Augmentation(self.augment, data.facts.mirror)

    def add(
        self, trainer: Trainer, distiller: Distiller, images: Tensor, labels: Tensor, loss: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the method's own loss, and ``{"metadd": weighted loss}`` if the term is due at this outer step."""
        step, weight = trainer.global_step, self.weight_at(trainer.global_step)
        focus, own = self.focus * self.share_at(step), None
        if focus or (weight and self.scale != "absolute"):
            loss, own = _differentiated(trainer, distiller, images, loss)
        if own is not None and focus:
            shared = self.shared_map(images, labels, distiller.label_kind, step)
            distiller.watch(**{"metadd/shared": shared.mean()})
            focused = own * focus_weights(_mean(trainer, own), shared, focus).to(own.dtype)
            loss = loss + attach_gradients(loss.new_zeros(()), [images], [focused - own])
            own = focused
        if weight == 0:
            return loss, {}
        rows = self._rows(trainer, len(images))
        labels = labels if self.move_labels else labels.detach()
        few, few_labels = (images, labels) if rows is None else (images[rows], labels[rows])
        streams: list[tuple[int, ...]] = [(step,), *((step, view) for view in range(1, self.views))]
        seen = torch.cat([self.augmentation(few, make_generator(self.seed, "augment", *stream)) for stream in streams])
        few_labels = few_labels.repeat(self.views, 1)
        consensus = None
        if self.options.consensus == "distiller":
            consensus = distiller.network(seen.detach() if self.options.detach_consensus else seen)
        is_shown = steps_to_log(trainer) < self.every  # no later step with the term comes before what is logged
        looking = self.looking_at(step)
        result = self.measure(seen, few_labels, distiller.label_kind, consensus, looking, is_shown)
        watched = {**result.terms, "loss": result.loss.detach()}
        factor: Tensor | float = weight
        if own is not None and self.scale != "absolute":
            own, term = _mean(trainer, own), _mean(trainer, _gradient(result.loss, images))
            factor = weight * own.norm() / term.norm().clamp(min=1e-12)
            if self.scale == "steady":
                watched["steady"] = self.share.take(own)
                factor = factor * watched["steady"]
        distiller.watch(**{f"metadd/{name}": value for name, value in watched.items()})
        return loss, {"metadd": factor * result.loss}

    @torch.no_grad()
    def shared_map(self, images: Tensor, labels: Tensor, label_kind: str, outer_step: int) -> Tensor:
        """Return the meta features ``(N, grid, grid)`` in [0, 1] of whole images, to those that look in this step."""
        options = replace(self.options, consensus="ensemble")  # nobody's prediction is compared
        maps = gathered_loss(self.looking_at(outer_step), images, labels, label_kind, options).maps
        maps = torch.cat(torch.split(maps, len(images), 1))  # a second layer is one more that agrees or does not
        return shared_map(maps, maps.flatten(2).any(2))

    def measure(
        self,
        images: Tensor,
        labels: Tensor,
        label_kind: str,
        consensus: Tensor | None = None,
        architectures: Sequence[Architecture] | None = None,
        with_maps: bool = True,
    ) -> MetaLoss:
        """Return loss, terms and maps of images ``(N, C, H, W)``, normalised; by default of all architectures."""
        looking = self.architectures if architectures is None else architectures
        return gathered_loss(looking, images, labels, label_kind, self.options, consensus, with_maps)

    def _rows(self, trainer: Trainer, count: int) -> Tensor | None:
        """Rows of this step and rank: a function of seed and step alone, so a resumed run is exact."""
        rank, world = trainer.global_rank, trainer.world_size
        if self.rows is None or self.rows >= count:
            return None if world == 1 else torch.arange(count)[rank::world]
        drawn = torch.randperm(count, generator=make_generator(self.seed, "rows", trainer.global_step))
        return drawn[: self.rows][rank::world]

    def state_dict(self) -> dict[str, Any]:
        """Keep the settings, and what is known of the method's gradient."""
        return {**super().state_dict(), "share": self.share.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; a :class:`UserError` if it is of other settings."""
        super().load_state_dict(state_dict)
        self.share.load_state_dict(state_dict["share"])


def _gradient(loss: Tensor, images: Tensor) -> Tensor:
    gradient: Tensor = torch.autograd.grad(loss, images, retain_graph=True)[0]
    return gradient


def _mean(trainer: Trainer, gradient: Tensor) -> Tensor:
    """The mean over processes, which DDP will make of their gradients; in float32."""
    return cast(Tensor, trainer.strategy.reduce(gradient.float().clone(), reduce_op="mean"))  # in place under DDP


def _differentiated(trainer: Trainer, distiller: Distiller, images: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Return the method's own loss with its gradients attached, and its gradient by the images.

    This way the gradient is known before the backward pass, and the loss's graph is traversed once, not twice. The
    graph is kept, because the term shares the part of it that leads from the learned tensors to the images.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is not None:  # float16 must go back with its scale
        return loss, _gradient(loss, images)
    learned = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    by_images, *gradients = torch.autograd.grad(loss, [images, *learned], allow_unused=True, retain_graph=True)
    return attach_gradients(loss.detach(), learned, gradients), by_images

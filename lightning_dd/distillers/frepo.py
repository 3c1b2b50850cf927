"""FRePo: neural feature regression with pooling (Zhou et al. 2022, arXiv 2206.00719)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dd.augment.frepo import Augmentation, apply
from lightning_dd.augment.siamese import siamese
from lightning_dd.data.images import Batch
from lightning_dd.distillers.pooled import PoolDistiller
from lightning_dd.losses import krr
from lightning_dd.models.factory import ArchitectureSpec
from lightning_dd.models.interface import Features, Network, features_in_slices, network_features
from lightning_dd.students.recipe import warmup_cosine
from lightning_dd.utils.errors import UserError, check_range, unknown_name

OUTER = ("mse", "cross_entropy")
"""Outer losses of :class:`FRePo` by name."""
FIRST_SCALE = 4.0
"""First scale of predictions in the cross-entropy: real images do best at 2 (CIFAR-10) to 8 (MNIST)."""


class FRePo(PoolDistiller):
    """Distil by kernel ridge regression on the features of a pool of partly trained networks.

    An outer step predicts a real batch from the synthetic set by ridge regression on the current network's
    features and minimises half the squared error (or a cross-entropy); learned labels also keep a margin. Gradients
    reach synthetic images and labels only. The defaults are the paper's; it runs 500,000 outer steps. A much shorter
    run needs a larger ``lr``: LAMB moves the images by about ``lr`` of their norm per step.

    Args:
        flip: add the mirror image of every synthetic image, with the same label (helps small sets, hurts large ones).
        views: augmented views of every synthetic image that an outer step adds, with the same label; the real batch is
            then augmented too, by the first view's operation. They join the images and do not replace them, as
            students learn both. The solve grows with the cube of all rows.
        augment: what views are made with: a strategy of :class:`~lightning_dd.augment.frepo.Augmentation` (``auto`` is
            FRePo's family for the data, with random numbers for every image), or ``siamese`` for DSA's, where a
            view's images and the real batch share theirs.
        outer: ``mse`` is half the squared error, ``cross_entropy`` that of the predictions times a learned scale as
            logits (:func:`~lightning_dd.losses.krr.scaled_cross_entropy`).
        scale_lr: learning rate (Adam) of the logarithm of that scale.
        kernels: networks of the pool that look in an outer step: the current one and others, drawn anew. Their kernels
            are averaged (:func:`~lightning_dd.losses.krr.averaged_kernel`), so unlike networks fit together.
        slice: synthetic images, mirrored ones and views among them, that a network looks at together; it looks again
            when the gradient comes back. Bounds the memory of large sets; 0 for all together.
        ridge: regulariser relative to the kernel's mean diagonal.
        lr: LAMB's learning rate, decayed by a cosine to 10 % over the run.
        compiled: ``torch.compile`` the features; worth half a minute of compiling for runs of many minutes.
        **kwargs: see :class:`PoolDistiller`.

    Attributes:
        log_scale: logarithm of the learned scale, where there is one: a scalar parameter.
    """

    def __init__(
        self,
        flip: bool = True,
        views: int = 0,
        augment: str = "auto",
        outer: str = "mse",
        scale_lr: float = 0.01,
        kernels: int = 1,
        slice: int = 0,
        ridge: float = krr.RIDGE,
        lr: float = 3e-4,
        compiled: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, **kwargs)
        check_range("at least 0", views=views, scale_lr=scale_lr, ridge=ridge, slice=slice)
        check_range("at least 1", kernels=kernels, pool_size=self.pool_size)
        if kernels > self.pool_size:
            raise UserError(f"kernels must be from 1 to pool_size, {self.pool_size}, got {kernels}")
        if outer not in OUTER:
            raise unknown_name("outer loss", outer, OUTER)
        self.flip, self.views, self.augment, self.ridge = flip, views, augment, ridge
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE))) if outer == "cross_entropy" else None
        if slice and self.perturb:  # the noise is gone when the network looks again
            raise UserError(f"slice must be 0 with perturb, got {slice}")
        self.scale_lr, self.kernels, self.slice = scale_lr, kernels, slice
        self._make_augmentation()
        self.features: Features = torch.compile(network_features, dynamic=False) if compiled else network_features

    def outer_loss(self, network: Network, images: Tensor, labels: Tensor, real: Batch) -> dict[str, Tensor]:
        """The error of the ridge prediction, and the margin term of learned labels."""
        support, shown = self.draw_views(images, real.images)
        support_labels = labels.repeat(len(support) // len(labels), 1)
        looks = [self.look(network, support, shown)]
        if self.kernels > 1:
            others = self.pool.others(self.kernels - 1, self.step_generator("kernels"))
            for place, other in enumerate(others, start=1):
                with self.perturbed(other, place):
                    looks.append(self.look(other, support, shown))
        features, query = krr.averaged_kernel(looks)
        prediction = krr.krr_predict(features, support_labels, query, self.ridge)
        terms = {"krr": self.prediction_error(prediction.values, real.labels)}
        if self.label_kind == "learned":
            terms["label"] = krr.label_margin_loss(labels)
        hits = prediction.values.detach().argmax(1) == real.labels
        self.watch(
            **{
                "outer/accuracy": hits.float().mean(),
                "outer/condition": prediction.condition,
                "outer/ridge": torch.tensor(prediction.ridge),
                "labels/margin": krr.label_margin(labels.detach()).mean(),
            }
        )
        return terms

    def look(self, network: Network, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return a network's features of synthetic images, and without graph of real ones: ``(N, num_features)``."""
        parts = torch.split(support, self.slice or len(support))
        if len(parts) == 1:
            own = self.features(network, support)
        else:
            looks = [checkpoint(self.features, network, part, use_reentrant=False) for part in parts]
            own = torch.cat(looks)
        return own, features_in_slices(network, query, self.features)

    def prediction_error(self, prediction: Tensor, classes: Tensor) -> Tensor:
        """Return the outer loss of predictions ``(B, num_classes)`` of real images of these classes ``(B,)``."""
        if self.log_scale is None:
            return krr.half_squared_error(prediction, krr.centred_one_hot(classes, prediction.shape[1]))
        scale = self.log_scale.exp()
        self.watch(**{"outer/scale": scale})
        return krr.scaled_cross_entropy(prediction, classes, scale)

    def draw_views(self, images: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return what an outer step sees: the synthetic images and all their views, one after another, and real ones.

        Args:
            images: synthetic images ``(n, C, H, W)``, normalised.
            real: real ones ``(B, C, H, W)``.
        """
        support = [images, images.flip(-1)] if self.flip else [images]
        if self.views:
            generator = self.step_generator("views")
            draws = [self._augmentation.draw(generator) for _ in range(self.views)]
            support += [apply(images, draw) for draw in draws]
            real = apply(real, draws[0])
        return torch.cat(support), real

    def setup(self, stage: str) -> None:
        """Take the augmentation for this data, too."""
        super().setup(stage)
        self._make_augmentation(self.facts.mirror)

    def configure_optimizers(self) -> Any:
        """Return LAMB as the paper's code runs it (no decay, no clipping), with a cosine to 10 % over the run."""
        from timm.optim.lamb import Lamb  # a second, only for those who distil with it

        groups = self.synthetic.parameter_groups(self.lr)
        if self.log_scale is not None:  # a trust ratio would stop it at a scale of 1
            groups = [*groups, {"params": [self.log_scale], "lr": self.scale_lr, "always_adapt": False}]
        optimizer = Lamb(
            groups,
            weight_decay=0.0,
            always_adapt=True,  # timm skips the trust ratio where there is no weight decay
            max_grad_norm=None,
        )
        steps = max(1, self.trainer.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, final=0.1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def student_architecture(self) -> str:
        """FRePo's students are its own network without normalisation: batch statistics of a few images mislead."""
        spec = ArchitectureSpec.parse(self.architecture)
        return str(spec.with_options(norm="none")) if spec.name == "conv" else self.architecture

    def _make_augmentation(self, mirror: bool = True) -> None:
        family = siamese("auto", mirror) if self.augment == "siamese" else Augmentation(self.augment, mirror)
        self._augmentation = family

"""DC: gradient matching (Zhao et al. 2021, arXiv 2006.05929), and DSA (Zhao & Bilen 2021, arXiv 2102.08259)."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot

from lightning_dd.augment.frepo import Draw, apply
from lightning_dd.data.images import Batch
from lightning_dd.distillers.matching import ClassMatching, measure_batch_statistics
from lightning_dd.losses.gradients import attach_gradients
from lightning_dd.losses.krr import centred_one_hot
from lightning_dd.losses.labels import student_loss
from lightning_dd.losses.matching import gradient_distance
from lightning_dd.models.interface import Network
from lightning_dd.models.pool import ModelPool
from lightning_dd.utils.errors import UserError, check_range

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Published by images per class: outer steps a network serves, and passes over the synthetic set between two."""

Rows = tuple[Tensor, Tensor]
"""Images ``(N, C, H, W)`` of one class and their label rows ``(N, num_classes)``."""


class DC(ClassMatching):
    """Distil by matching, class by class, the gradients that real and synthetic images give a network's weights.

    An outer step sums :func:`~lightning_dd.losses.matching.gradient_distance` over classes. Between outer steps the
    network learns the synthetic set, and after a number of them it is replaced by a fresh one; both numbers follow
    from ``ipc`` by the published table (1: 1 outer step, 10: 10 with 50 passes between two, 50: 50 with 10; other
    numbers take the next larger entry). The published runs show images 1,000 networks. Labels other than hard ones
    are ours: both sides are then fitted with half the squared error.

    The second-order graph lives for one class at a time, so memory does not grow with the number of classes.

    Args:
        init: ``noise``, or ``real`` for random training images.
        lr: learning rate of the images, and of learned labels.
        inner_steps: inner steps after an outer step; ``None`` takes the table (passes times batches per pass). Leave
            ``PoolAlternation`` without a number of its own.
        lifetime: inner steps a network takes before it is replaced; ``None`` takes the table.
        **kwargs: see :class:`~lightning_dd.distillers.matching.ClassMatching`.
    """

    label_kinds: ClassVar[tuple[str, ...]] = ("hard", "centred", "learned")
    protocol: ClassVar[str] = "dc"

    def __init__(
        self,
        init: str = "noise",
        lr: float = 0.1,
        inner_steps: int | None = None,
        lifetime: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init=init, lr=lr, lifetime=lifetime or 0, **kwargs)
        check_range("at least 1", inner_steps=inner_steps)
        published = min((known for known in LOOPS if known >= self.ipc), default=max(LOOPS))
        self.outer_loop, self.inner_loop = LOOPS[published]
        self._given_steps, self._given_lifetime = inner_steps, lifetime

    @property
    def inner_steps(self) -> int:
        """Inner steps after an outer step: as many as were asked for, or the published passes over the set."""
        batches = -(-len(self.synthetic) // self.inner_batch_size)
        return self._given_steps or self.inner_loop * batches

    def draw_inner_rows(self, count: int, device: torch.device) -> Tensor:
        """Return the next batch of a pass: every pass shows all images once, in an order of its own."""
        batches = -(-count // self.inner_batch_size)
        done, place = divmod(self.pool.current.age % self.inner_steps, batches)
        order = torch.randperm(count, generator=self.step_generator("inner pass", done))
        return order[place * self.inner_batch_size :][: self.inner_batch_size].to(device)

    def configure_pool(self, generator: torch.Generator, device: torch.device) -> ModelPool:
        """Return the pool; a network serves the published number of outer steps unless its lifetime was given."""
        if self._given_lifetime is None:
            self.lifetime = (self.outer_loop - 1) * self.inner_steps
        return super().configure_pool(generator, device)

    def on_fit_start(self) -> None:
        """Refuse a clock whose number of inner steps is not the one that the networks' lifetime counts on."""
        super().on_fit_start()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            given = getattr(callback, "inner_steps", None)
            if given not in (None, self.inner_steps):
                raise UserError(
                    f"PoolAlternation has inner_steps {given}, {type(self).__name__} with ipc {self.ipc} runs "
                    f"{self.inner_steps}: leave the callback's out, or set model.inner_steps"
                )

    def outer_loss(self, network: Network, images: Tensor, labels: Tensor, real: Batch) -> dict[str, Tensor]:
        """Return the distance of gradients, summed over classes; its own gradient is gathered class by class."""
        num_classes = labels.shape[1]
        measure_batch_statistics(network, real.images, num_classes)
        matched = [(name, weight) for name, weight in network.named_parameters() if weight.ndim > 1]
        weights = {name: weight.detach().requires_grad_() for name, weight in matched}
        hard = self.label_kind == "hard"
        targets = one_hot(real.labels, num_classes).float() if hard else centred_one_hot(real.labels, num_classes)
        leaves = [t.detach().requires_grad_(torch.is_grad_enabled() and t.requires_grad) for t in (images, labels)]
        blocks = zip(*(t.tensor_split(num_classes) for t in (*leaves, real.images, targets)), strict=True)
        distances, shares = [], []
        for draw, (x, y, real_x, real_y) in zip(self.draw_siamese(num_classes), blocks, strict=True):
            distance, share = self._match(network, weights, (x, y), (real_x, real_y), draw)
            distances.append(distance)
            shares.append(share)
        gathered = [None if column[0] is None else torch.cat(column) for column in zip(*shares, strict=True)]
        return {"gradients": attach_gradients(torch.stack(distances).sum(), (images, labels), gathered)}

    def _match(
        self, network: Network, weights: dict[str, Tensor], own: Rows, real: Rows, draw: Draw
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return one class's distance without graph, and its gradients by images and labels where they need one.

        A function of its own, so that no class's graph outlives it.
        """
        needed = [part.requires_grad for part in own]
        target = self._weight_gradients(network, weights, real, draw)
        distance = gradient_distance(self._weight_gradients(network, weights, own, draw, any(needed)), target)
        if not any(needed):
            return distance, [None, None]
        with torch.autocast(distance.device.type, enabled=False):
            found = iter(torch.autograd.grad(distance, [part for part in own if part.requires_grad]))
        return distance.detach(), [next(found) if need else None for need in needed]

    def _weight_gradients(
        self, network: Network, weights: dict[str, Tensor], rows: Rows, draw: Draw, differentiable: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the gradients of a student's loss by the weights; the network itself stays at rest."""
        images, labels = rows
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            seen = apply(images, draw).contiguous(memory_format=torch.channels_last)
            loss = student_loss(functional_call(network, weights, (seen,)), labels, self.label_kind)
            with torch.autocast(seen.device.type, enabled=False):
                return torch.autograd.grad(loss, list(weights.values()), create_graph=differentiable)


class DSA(DC):
    """DC under siamese augmentation: each class's real and synthetic images are changed alike before both gradients.

    Networks learn augmented synthetic images as well.

    Args:
        init: ``real`` for random training images, or ``noise``.
        augment: see :class:`~lightning_dd.distillers.matching.ClassMatching`.
        **kwargs: see :class:`DC`.
    """

    protocol: ClassVar[str] = "dsa"

    def __init__(self, init: str = "real", augment: str = "auto", **kwargs: Any) -> None:
        super().__init__(init=init, augment=augment, **kwargs)

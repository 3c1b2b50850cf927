"""The synthetic set: learnable images and labels."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dd.data.images import Split
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.losses.krr import centred_one_hot
from lightning_dd.utils.errors import UserError

LABEL_KINDS = ("learned", "centred", "hard")


class SyntheticSet(nn.Module):
    """Learnable images and labels, in blocks of ``ipc`` rows per class, classes in order.

    Images live in normalised space and are never clipped. Labels start from FRePo's
    ``(onehot - 1/C) / sqrt(C/10)`` (Zhou et al. 2022) for the kinds ``learned`` (a parameter) and ``centred`` (the
    same values, fixed), or from one-hot vectors for ``hard`` (fixed).

    A parameterisation other than pixels overrides :meth:`render`, :meth:`start` and :meth:`parameter_groups`.

    Args:
        ipc: images per class, at least 1.
        num_classes: number of classes C.
        image_shape: ``(channels, height, width)``.
        label_kind: ``learned``, ``centred`` or ``hard``.

    Attributes:
        images: ``(C * ipc, channels, height, width)`` parameter.
        labels: ``(C * ipc, C)`` parameter, or buffer when fixed.
        classes: ``(C * ipc,)`` int64 buffer, the class each row belongs to.

    Raises:
        UserError: ``ipc`` or ``label_kind`` is out of range.
    """

    images: Tensor
    labels: Tensor
    classes: Tensor

    def __init__(
        self, ipc: int, num_classes: int, image_shape: tuple[int, int, int], label_kind: str = "learned"
    ) -> None:
        super().__init__()
        check_synthetic(ipc, label_kind)
        self.ipc = ipc
        self.num_classes = num_classes
        self.image_shape = image_shape
        self.label_kind = label_kind
        self.register_buffer("classes", torch.arange(num_classes).repeat_interleave(ipc), persistent=False)
        self.make_learnable()
        labels = initial_labels(self.classes, num_classes, label_kind)
        if label_kind == "learned":
            self.labels = nn.Parameter(labels)
        else:
            self.register_buffer("labels", labels)

    def __len__(self) -> int:
        return len(self.classes)

    def make_learnable(self) -> None:
        """Make what the images are learned through; here the images themselves."""
        self.images = nn.Parameter(torch.zeros(self.num_classes * self.ipc, *self.image_shape))

    def render(self) -> Tensor:
        """Return the images ``(n, C, H, W)`` in normalised space, with graph to what is learned."""
        return self.images

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return images ``(n, C, H, W)`` in normalised space and labels ``(n, num_classes)``."""
        return self.render(), self.labels

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return all that is learned as an outer optimizer's parameter groups, each with its learning rate.

        Args:
            lr: the outer learning rate, which a group may take a multiple of.
        """
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad], "lr": lr}]

    def start(self, init: str, train: Split, generator: torch.Generator) -> None:
        """Fill the set for a first fit.

        Args:
            init: ``real`` for :meth:`init_real`, ``noise`` for :meth:`init_noise`.
            train: the training images.
            generator: CPU generator of the draw.

        Raises:
            UserError: a class has fewer than ``ipc`` images.
        """
        if init == "real":
            self.init_real(train, generator)
        else:
            self.init_noise(generator)

    @torch.no_grad()
    def init_real(self, train: Split, generator: torch.Generator) -> None:
        """Start from real images: ``ipc`` per class, drawn without replacement.

        Args:
            train: the training images.
            generator: CPU generator of the draw.

        Raises:
            UserError: a class has fewer than ``ipc`` images.
        """
        rows = draw_per_class(train.labels, self.ipc, self.num_classes, generator)
        self.images.copy_(train.take(rows).images)

    @torch.no_grad()
    def init_noise(self, generator: torch.Generator) -> None:
        """Start from standard normal noise drawn with a CPU generator."""
        self.images.copy_(torch.randn(self.images.shape, generator=generator))


def check_synthetic(ipc: int, label_kind: str) -> None:
    """Refuse settings no synthetic set can have.

    Raises:
        UserError: ``ipc`` is below 1 or ``label_kind`` is unknown.
    """
    if ipc < 1:
        raise UserError(f"ipc (images per class) must be at least 1, got {ipc}")
    if label_kind not in LABEL_KINDS:
        raise UserError(f"labels must be one of {', '.join(LABEL_KINDS)}, got '{label_kind}'")


def initial_labels(classes: Tensor, num_classes: int, label_kind: str) -> Tensor:
    """Return label rows ``(n, num_classes)`` of a kind for class indices ``(n,)``.

    Example:
        >>> initial_labels(torch.tensor([0]), 2, "hard")
        tensor([[1., 0.]])
    """
    if label_kind == "hard":
        one_hot: Tensor = torch.eye(num_classes, device=classes.device)[classes]
        return one_hot
    return centred_one_hot(classes, num_classes) / math.sqrt(num_classes / 10)

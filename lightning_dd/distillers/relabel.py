"""Soft labels: a teacher's answers to a finished set, and to views of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dd.distilled.views import SoftViews, draw_views
from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError

_ROWS = 512
"""Views in one forward pass of the teacher."""


@dataclass(frozen=True)
class SoftLabels:
    """How a teacher labels a set, after SRe2L (Yin et al. 2023, arXiv 2306.13092) and FKD (arXiv 2112.01528).

    Args:
        epochs: epochs of views that are labelled and stored; 0 labels the plain images only.
        min_scale: smallest area of a view's random crop as a share of the image's.
        temperature: of the students' softmax.

    Raises:
        UserError: a number is out of range.
    """

    epochs: int = 300
    min_scale: float = 0.08
    temperature: float = 20.0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise UserError(f"soft_epochs must be at least 0, got {self.epochs}")
        if not 0 < self.min_scale <= 1:
            raise UserError(f"soft_min_scale must be in (0, 1], got {self.min_scale}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature must be positive, got {self.temperature}")


@torch.no_grad()
def teacher_logits(teacher: Network, images: Tensor) -> Tensor:
    """Return the teacher's logits ``(N, num_classes)`` of images ``(N, C, H, W)``: float32, on their device."""
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([teacher(part).float() for part in torch.split(images, _ROWS)])


@torch.no_grad()
def labelled_views(
    teacher: Network, images: Tensor, soft: SoftLabels, flip: bool, generator: torch.Generator
) -> SoftViews | None:
    """Draw the views of a set and have the teacher label each; views of all epochs share its forward passes.

    Args:
        teacher: in inference mode.
        images: all images ``(n, C, H, W)``, normalised, on the teacher's device.
        soft: how many views, and which crops.
        flip: whether views may be mirrored.
        generator: CPU generator.

    Returns:
        The views on the CPU; ``None`` for 0 epochs.

    Raises:
        UserError: the teacher's logits do not fit half precision.
    """
    if soft.epochs == 0:
        return None
    count, channels, height, width = images.shape
    shape = (channels, height, width)
    drawn = draw_views(soft.epochs, shape, count, teacher.num_classes, generator, soft.min_scale, flip)
    here = drawn.to(images.device)
    places = torch.arange(soft.epochs * count, device=images.device)
    parts = [
        teacher_logits(teacher, here.look(images, part // count, part % count)).half()
        for part in torch.split(places, _ROWS)
    ]
    logits = torch.cat(parts).view(soft.epochs, count, -1).cpu()
    return SoftViews(**{**drawn.state_dict(), "logits": logits})

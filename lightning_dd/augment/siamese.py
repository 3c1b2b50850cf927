"""Differentiable siamese augmentation: the family of DC, DSA, DM and MTT (Zhao & Bilen 2021, arXiv 2102.08259).

One operation is drawn per batch. In siamese use its random numbers are shared by all images, and the same draw is
applied to the real and to the synthetic images of a class, so that the two stay comparable; students get numbers of
their own for every image. As in the other family everything acts in normalised space, holes and borders are 0, and
nothing is clipped.

    >>> augment = siamese("crop_rotate")
    >>> draw = augment.draw(torch.Generator().manual_seed(0))
    >>> real, synthetic = torch.ones(4, 1, 8, 8), torch.ones(1, 1, 8, 8)
    >>> torch.equal(apply(real, draw)[2:3], apply(synthetic, draw))
    True
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dd.augment.frepo import Augmentation, Operation, apply, erase, mirror, recolour, resample

__all__ = ["TRANSFORMS", "apply", "digits", "siamese"]

_NUMBERS = 3

Transform = Callable[[Tensor, Tensor], Tensor]
"""From images ``(N, C, H, W)`` and uniform numbers in [0, 1) ``(3, N)`` to images."""


def siamese(strategy: str, mirror: bool = True, shared: bool = True) -> Augmentation:
    """Return an augmentation of this family.

    Args:
        strategy: see :class:`~lightning_dd.augment.frepo.Augmentation`.
        mirror: likewise.
        shared: give all images of a batch the same random numbers; otherwise each gets its own.

    Raises:
        UserError: an operation is unknown.
    """
    operations = {name: _operation(transform, shared) for name, transform in TRANSFORMS.items()}
    return Augmentation(strategy, mirror, operations, shared)


def color(images: Tensor, numbers: Tensor) -> Tensor:
    """Shift brightness by up to 0.5, then scale saturation by a factor in [0, 2], then contrast by one in [.5, 1.5]."""
    return recolour(images, numbers[0] - 0.5, 2 * numbers[1], numbers[2] + 0.5)


def crop(images: Tensor, numbers: Tensor) -> Tensor:
    """Shift by whole pixels, up to 1/8 of the side either way, zeros outside."""
    height, width = images.shape[-2:]
    down, across = (_share(side, 0.125) for side in (height, width))
    ones, zeros = torch.ones_like(numbers[0]), torch.zeros_like(numbers[0])
    x = _whole(numbers[0], -across, across) * 2 / width  # the grid spans [-1, 1]
    y = _whole(numbers[1], -down, down) * 2 / height
    return resample(images, ones, zeros, zeros, ones, x, y)


def cutout(images: Tensor, numbers: Tensor) -> Tensor:
    """Fill a square hole of half the side with 0, its centre anywhere, cut off at the border."""
    height, width = images.shape[-2:]
    down, across = (_share(side, 0.5) for side in (height, width))
    top = _whole(numbers[0], 0, height - down % 2) - down // 2
    left = _whole(numbers[1], 0, width - across % 2) - across // 2
    return erase(images, top, left, down, across)


def flip(images: Tensor, numbers: Tensor) -> Tensor:
    """Mirror left to right with probability 1/2."""
    return mirror(images, numbers[0] < 0.5)


def scale(images: Tensor, numbers: Tensor) -> Tensor:
    """Resize each axis about the centre by its own factor in [1/1.2, 1.2], zeros outside."""
    across, down = (1 / 1.2 + (1.2 - 1 / 1.2) * number for number in numbers[:2])
    zeros = torch.zeros_like(across)
    return resample(images, across, zeros, zeros, down, zeros, zeros)


def rotate(images: Tensor, numbers: Tensor) -> Tensor:
    """Rotate by up to 15 degrees either way, zeros outside."""
    angle = (2 * numbers[0] - 1) * (math.pi / 12)
    zeros = torch.zeros_like(angle)
    return resample(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos(), zeros, zeros)


TRANSFORMS: dict[str, Transform] = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}


def digits(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change every image by one of three operations of its own: how DC's official code augments MNIST for students.

    It is shifted by -4 to 3 pixels, what comes into view being the batch's mean of its channel; or resized on each axis
    by a factor in [0.8, 1.2] on a ground of zeros; or rotated by -45 to 44 degrees on a ground of the batch's mean. All
    of it is bilinear here, where the official code takes the nearest pixel to resize and a cubic spline to rotate.
    """
    numbers = torch.rand(3, len(images), generator=generator, device=images.device)
    ones, zeros = torch.ones_like(numbers[0]), torch.zeros_like(numbers[0])
    height, width = images.shape[-2:]
    x, y = _whole(numbers[0], -4, 3) * 2 / width, _whole(numbers[1], -4, 3) * 2 / height
    across, down = 1 / (0.8 + 0.4 * numbers[:2])
    angle = _whole(numbers[0], -45, 44) * (math.pi / 180)
    shift = ones, zeros, zeros, ones, x, y
    stretch = across, zeros, zeros, down, zeros, zeros
    turn = angle.cos(), -angle.sin(), angle.sin(), angle.cos(), zeros, zeros
    means = images.mean((0, 2, 3))
    chosen, rows = (3 * numbers[2]).long(), torch.arange(len(images), device=images.device)
    maps = torch.stack([torch.stack(numbers) for numbers in (shift, stretch, turn)])[chosen, :, rows]
    a, b, c, d, x, y = maps.unbind(1)
    ground = torch.stack([means, torch.zeros_like(means), means.mean().expand_as(means)])[chosen][:, :, None, None]
    return resample(images - ground, a, b, c, d, x, y) + ground


def _operation(transform: Transform, shared: bool) -> Operation:
    """Return the transform with random numbers from a generator."""

    def operation(images: Tensor, generator: torch.Generator) -> Tensor:
        count = 1 if shared else len(images)
        numbers = torch.rand(_NUMBERS, count, generator=generator, device=images.device)
        return transform(images, numbers.expand(_NUMBERS, len(images)))

    return operation


def _share(side: int, share: float) -> int:
    """Round a share of a side to whole pixels, halves up."""
    return int(side * share + 0.5)


def _whole(number: Tensor, low: int, high: int) -> Tensor:
    """Turn uniform numbers in [0, 1) into whole ones in [low, high], as floats."""
    return low + (number * (high - low + 1)).floor()

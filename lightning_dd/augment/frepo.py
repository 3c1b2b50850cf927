"""Differentiable augmentation on batches of normalised images, on their device.

FRePo's family (Zhou et al. 2022, official code: ``lib/dataset/augmax``): one operation drawn per batch, its parameters
per sample. They act in normalised (possibly whitened) space: "brightness" is a shift there and a hole is filled with 0,
the data mean. What moves into view from outside an image repeats its edge. Nothing is clipped to a pixel range.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.utils.arguments import find_object
from lightning_dd.utils.errors import UserError, unknown_name

Operation = Callable[[Tensor, torch.Generator], Tensor]
"""From images ``(N, C, H, W)`` and a generator on their device to images, differentiable."""


class Draw(NamedTuple):
    """One drawn transformation: applying it again to another batch repeats operation and random numbers."""

    operation: Operation
    seed: int


class Augmentation:
    """Apply one randomly drawn operation of a strategy to a batch.

    Args:
        strategy: operation names joined by ``_``, or ``auto`` for all of the family; operations of your own are dotted
            paths joined by ``+``, as in ``flip_crop+my_package.blur``. An empty string or ``none`` leaves images alone.
        mirror: whether the data may be mirrored; otherwise ``auto`` is without ``flip``.
        operations: the operations by name; ``None`` takes FRePo's.
        shared: give all images of a batch the same random numbers in operations of your own.

    Attributes:
        strategy: the strategy with ``auto`` written out.

    Raises:
        UserError: an operation is unknown.

    Example:
        >>> augment = Augmentation("flip_cutout")
        >>> augment(torch.ones(4, 1, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 8, 8])
        >>> Augmentation("auto", mirror=False).strategy
        'color_crop_rotate_translate_cutout'
    """

    def __init__(
        self,
        strategy: str,
        mirror: bool = True,
        operations: Mapping[str, Operation] | None = None,
        shared: bool = False,
    ) -> None:
        known = OPERATIONS if operations is None else operations
        family = "_".join(name for name in known if mirror or name != "flip")
        parts = [] if strategy in ("", "none") else strategy.split("+")
        parts = [family if part == "auto" else part for part in parts]
        self.strategy = "+".join(parts) or strategy
        self.operations: list[Operation] = []
        for part in parts:
            if "." in part:
                self.operations.append(_operation_at(part, shared))
                continue
            for name in part.split("_"):
                if name not in known:
                    raise unknown_name("augmentation", name, known)
                self.operations.append(known[name])

    def draw(self, generator: torch.Generator) -> Draw:
        """Draw an operation and the seed of its parameters from a CPU generator (so no device is waited for).

        A strategy without operations draws one that leaves images alone.
        """
        if not self.operations:
            return Draw(keep, 0)
        choice = int(torch.randint(len(self.operations), (), generator=generator))
        return Draw(self.operations[choice], int(torch.randint(2**62, (), generator=generator)))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``(N, C, H, W)`` with a fresh draw from a CPU generator."""
        return apply(images, self.draw(generator)) if self.operations else images


def apply(images: Tensor, draw: Draw) -> Tensor:
    """Apply a draw to ``(N, C, H, W)``: a pure function of its arguments on one kind of device."""
    return draw.operation(images, torch.Generator(images.device).manual_seed(draw.seed))


def _operation_at(path: str, shared: bool) -> Operation:
    """Import an operation of somebody's own."""
    found = find_object(path, "augmentation")
    if not callable(found):
        raise UserError(f"augmentation '{path}' must be a function of images (N, C, H, W) and a torch.Generator")
    operation: Operation = found

    def alike(images: Tensor, generator: torch.Generator) -> Tensor:
        one_image = torch.func.vmap(lambda image: operation(image[None], generator)[0], randomness="same")
        return one_image(images)

    return alike if shared else operation


def keep(images: Tensor, generator: torch.Generator) -> Tensor:
    """Leave images alone."""
    return images


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    return mirror(images, _uniform(images, 0, 1, generator) < 0.5)


def color(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift brightness by up to 0.25, scale saturation and contrast by factors in [e^-.25, e^.25]."""
    brightness, saturation, contrast = (_uniform(images, -0.25, 0.25, generator) for _ in range(3))
    return recolour(images, brightness, saturation.exp(), contrast.exp())


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Zoom by a log-uniform factor z in [0.8, 1.25], anywhere the smaller of image and window lies inside the larger.

    The window's centre is therefore up to ``|1 - 1/z| / 2`` of the side away, 4 of 32 pixels at most.
    """
    window = _uniform(images, -math.log(1.25), math.log(1.25), generator).exp()  # the side of the window, 1 / z
    across, down = (_uniform(images, -1, 1, generator) * (1 - window).abs() for _ in range(2))
    zeros = torch.zeros_like(window)
    return resample(images, window, zeros, zeros, window, across, down, "border")


def rotate(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 15 degrees either way."""
    angle = _uniform(images, -15, 15, generator) * (math.pi / 180)
    zeros = torch.zeros_like(angle)
    return resample(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos(), zeros, zeros, "border")


def translate(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 1/8 of the side either way."""
    across, down = (_uniform(images, -0.25, 0.25, generator) for _ in range(2))  # the grid spans [-1, 1]
    ones, zeros = torch.ones_like(across), torch.zeros_like(across)
    return resample(images, ones, zeros, zeros, ones, across, down, "border")


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a square hole of a quarter of the side with 0, wherever it lies whole inside the image."""
    height, width = images.shape[-2:]
    down, across = max(1, height // 4), max(1, width // 4)
    top, left = (_uniform(images, 0, free + 1, generator).floor() for free in (height - down, width - across))
    return erase(images, top, left, down, across)


OPERATIONS: dict[str, Operation] = {
    "flip": flip,
    "color": color,
    "crop": crop,
    "rotate": rotate,
    "translate": translate,
    "cutout": cutout,
}


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images for which ``mirrored`` ``(N,)`` is true left to right."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def recolour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add ``brightness``, then scale the deviation from each pixel's grey, then that from each image's mean.

    Args:
        images: ``(N, C, H, W)``.
        brightness: ``(N,)`` summands.
        saturation: ``(N,)`` factors.
        contrast: ``(N,)`` factors.
    """
    shape = (-1, 1, 1, 1)
    images = images + brightness.view(shape)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * saturation.view(shape) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * contrast.view(shape) + mean


def erase(images: Tensor, top: Tensor, left: Tensor, height: float, width: float) -> Tensor:
    """Fill rows ``[top, top + height)`` and columns ``[left, left + width)`` with 0; the corners are ``(N,)``."""
    rows = torch.arange(images.shape[-2], device=images.device)
    columns = torch.arange(images.shape[-1], device=images.device)
    top, left = top.view(-1, 1, 1), left.view(-1, 1, 1)
    inside_rows = (rows[:, None] >= top) & (rows[:, None] < top + height)
    inside_columns = (columns >= left) & (columns < left + width)
    return images.masked_fill((inside_rows & inside_columns).unsqueeze(1), 0)


def resample(
    images: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor, y: Tensor, outside: str = "zeros"
) -> Tensor:
    """Resample through the per-image map ``[[a, b, x], [c, d, y]]`` of the [-1, 1] grid.

    ``outside`` the images are ``zeros``, or the edge goes on (``border``).
    """
    theta = torch.stack([a, b, x, c, d, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode=outside, align_corners=False)


def _uniform(images: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    draw = torch.rand(len(images), generator=generator, device=images.device, dtype=torch.float32)
    return draw * (high - low) + low

"""Random resized crops as numbers: drawn once, applied to any batch of images. Plain torch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST_RATIO = 4 / 3
_TRIES = 10


def draw_crops(
    count: int, sides: tuple[int, int], min_scale: float, generator: torch.Generator, ratio: float = _LARGEST_RATIO
) -> Tensor:
    """Draw the boxes of random resized crops as torchvision's ``RandomResizedCrop`` does.

    The area is uniform in ``[min_scale, 1]`` and the aspect ratio log-uniform in ``[1/ratio, ratio]``; a box of whole
    pixels that does not fit into the image is drawn again, ten times at most, and then the largest box about the centre
    is taken whose ratio is allowed. The place is uniform.

    Args:
        count: boxes N.
        sides: height and width of the images in pixels.
        min_scale: smallest area as a share of the image's.
        generator: CPU generator.
        ratio: largest aspect ratio.

    Returns:
        ``(N, 4)``: left, top, width, height as shares of the sides.

    Example:
        >>> draw_crops(2, (32, 32), 1.0, torch.Generator().manual_seed(0)).tolist()  # nothing is cut off
        [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    height, width = sides
    largest = min(width, round(height * ratio)), min(height, round(width * ratio))
    centred = (width - largest[0]) // 2, (height - largest[1]) // 2, *largest
    boxes = torch.tensor(centred, dtype=torch.float32).repeat(count, 1)
    missing = torch.arange(count)
    for _ in range(_TRIES):
        draws = torch.rand(len(missing), 4, generator=generator)
        area = (min_scale + (1 - min_scale) * draws[:, 0]) * (height * width)
        aspect = ((2 * draws[:, 1] - 1) * math.log(ratio)).exp()
        across, down = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        places = [(draws[:, 2] * (width - across + 1)).floor(), (draws[:, 3] * (height - down + 1)).floor()]
        fits = (across > 0) & (across <= width) & (down > 0) & (down <= height)
        boxes[missing[fits]] = torch.stack([*places, across, down], 1)[fits]
        missing = missing[~fits]
    return boxes / torch.tensor([width, height, width, height])


def draw_padded(count: int, sides: tuple[int, int], padding: int, generator: torch.Generator) -> Tensor:
    """Draw crops of an image's own size out of the padded image, as torchvision's ``RandomCrop`` does.

    Args:
        count: boxes N.
        sides: height and width of the images in pixels.
        padding: pixels on every side.
        generator: CPU generator.

    Returns:
        ``(N, 4)``, as :func:`draw_crops`; they go over the border.
    """
    places = torch.randint(-padding, padding + 1, (count, 2), generator=generator)
    return torch.cat([places / torch.tensor(sides[::-1]), torch.ones(count, 2)], 1)


def resample(images: Tensor, crops: Tensor, flips: Tensor, outside: Tensor | None = None) -> Tensor:
    """Bring crops of images back to full size (bilinear) and mirror some; every row by itself, whatever the batch.

    Args:
        images: ``(N, C, H, W)``.
        crops: ``(N, 4)``: left, top, width, height as shares of the sides.
        flips: ``(N,)`` bool.
        outside: ``(C,)``: values beyond the border of an image; ``None`` repeats its edge.

    Returns:
        ``(N, C, H, W)``; the whole image as crop gives the image. As in torchvision nothing outside a crop is seen.
    """
    shape = (len(images), *images.shape[2:])
    across = _places(crops[:, 0], crops[:, 2], images.shape[3], torch.where(flips, -1.0, 1.0))
    down = _places(crops[:, 1], crops[:, 3], images.shape[2], torch.ones_like(crops[:, 1]))
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], 3)
    with torch.autocast(images.device.type, enabled=False):
        if outside is None:
            return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        ground = outside.view(-1, 1, 1)
        return F.grid_sample(images.float() - ground, grid, padding_mode="zeros", align_corners=False) + ground


def _places(start: Tensor, share: Tensor, side: int, direction: Tensor) -> Tensor:
    """Return where an axis is sampled, ``(N, side)`` in [-1, 1], no further out than the crop's outermost pixels."""
    centres = (2 * torch.arange(side, device=start.device) + 1) / side - 1
    start, share = start[:, None], share[:, None]
    places = (2 * start + share - 1) + direction[:, None] * share * centres
    return places.clamp(2 * start - 1 + 1 / side, 2 * (start + share) - 1 - 1 / side)

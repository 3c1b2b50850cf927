"""Random resized crops as numbers: drawn once, applied to any batch of images. Plain torch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST_RATIO = 4 / 3


def draw_crops(count: int, min_scale: float, generator: torch.Generator, ratio: float = _LARGEST_RATIO) -> Tensor:
    """Draw the boxes of random resized crops: left, top, width, height as shares of the sides, ``(count, 4)``.

    The area is uniform in ``[min_scale, 1]``, the aspect ratio log-uniform in ``[1/ratio, ratio]`` as far as the crop
    then fits into the image, the place uniform.

    Example:
        >>> draw_crops(2, 1.0, torch.Generator().manual_seed(0)).tolist()  # nothing is cut off
        [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    draws = torch.rand(count, 4, generator=generator)
    area = min_scale + (1 - min_scale) * draws[:, 0]
    widest = torch.clamp(-area.log(), max=math.log(ratio))
    aspect = ((2 * draws[:, 1] - 1) * widest).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1.0)
    return torch.cat([draws[:, 2:] * (1 - sides), sides], 1)


def resample(images: Tensor, crops: Tensor, flips: Tensor) -> Tensor:
    """Bring crops of images back to full size (bilinear) and mirror some; every row by itself, whatever the batch.

    Args:
        images: ``(N, C, H, W)``.
        crops: ``(N, 4)``: left, top, width, height as shares of the sides.
        flips: ``(N,)`` bool.

    Returns:
        ``(N, C, H, W)``; the whole image as crop gives the image.
    """
    height, width = images.shape[2:]
    direction = torch.where(flips, -1.0, 1.0).unsqueeze(1)
    across = (2 * crops[:, :1] + crops[:, 2:3] - 1) + direction * crops[:, 2:3] * _centres(width, images.device)
    down = (2 * crops[:, 1:2] + crops[:, 3:] - 1) + crops[:, 3:] * _centres(height, images.device)
    shape = (len(images), height, width)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], 3)
    with torch.autocast(images.device.type, enabled=False):
        return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def _centres(side: int, device: torch.device) -> Tensor:
    """Pixel centres in [-1, 1]."""
    return (2 * torch.arange(side, device=device) + 1) / side - 1

"""What class-activation maps of several architectures have in common: MetaDD's meta and heterogeneous features.

*Meta features* are where the normalised maps of all architectures are high, *heterogeneous features* where only some
are (arXiv 2410.05103). Everything here is a pure function of the maps ``(M, N, I, J)`` in [0, 1] of M architectures and
N images; maps that say nothing are not ``alive`` and are zeros.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.losses.gradients import wide

POSITIVITY_FORMS = ("meta", "heterogeneous", "position")
_SMALLEST = 1e-12


class Partition(NamedTuple):
    """Which pixels the architectures agree on."""

    meta: Tensor
    """``(N, I, J)`` bool: high in all maps."""
    heterogeneous: Tensor
    """``(M, N, I, J)`` bool: high in this map but not in all."""
    ratio: Tensor
    """``(N,)`` ``|meta| / |high in any|``; 0 where no map is high anywhere."""


def meta_partition(maps: Tensor, threshold: float = 0.5, alive: Tensor | None = None) -> Partition:
    """Split the pixels into meta and heterogeneous ones; high is ``>= threshold``. Without gradient.

    Args:
        maps: ``(M, N, I, J)`` normalised.
        threshold: the paper's is 0.5.
        alive: ``(M, N)`` bool; dead maps are left out of "all". None takes every map for live. An image with fewer
            than two live maps has no meta pixel: one architecture agrees with nobody.

    Example:
        >>> maps = torch.tensor([[[[0.9, 0.7, 0.1]]], [[[0.8, 0.2, 0.3]]]])
        >>> part = meta_partition(maps)
        >>> part.meta.tolist(), part.heterogeneous[0].tolist(), part.ratio.tolist()
        ([[[True, False, False]]], [[[False, True, False]]], [0.5])
    """
    live = torch.ones_like(maps[:, :, :1, :1], dtype=torch.bool) if alive is None else alive[:, :, None, None]
    high = (maps.detach() >= threshold) & live
    meta = (high | ~live).all(0) & (live.sum(0) >= 2)
    union = high.any(0).sum((1, 2))
    ratio = meta.sum((1, 2)) / union.clamp(min=1)
    return Partition(meta, high & ~meta, ratio)


def shared_map(maps: Tensor, alive: Tensor) -> Tensor:
    """Return meta features without a threshold, ``(N, I, J)``: at each pixel the least value of all live maps.

    Where it is ``>= threshold``, all live maps are high: with two of them or more, that is :func:`meta_partition`'s
    ``meta``. An image without a live map gets ones.

    Args:
        maps: ``(M, N, I, J)`` normalised.
        alive: ``(M, N)`` bool.

    Example:
        >>> shared_map(torch.tensor([[[[0.9, 0.7]]], [[[0.5, 0.8]]]]), torch.ones(2, 1, dtype=torch.bool)).tolist()
        [[[0.5, 0.699999988079071]]]
    """
    return torch.where(alive[:, :, None, None], maps, 1.0).amin(0)


def focus_weights(gradient: Tensor, shared: Tensor, focus: float) -> Tensor:
    """Return what to multiply the gradient by images with, so that it acts on meta features and keeps its size.

    ``1 - focus + focus * shared`` at every pixel, times what gives the gradient of each image its norm again. EDF (Wang
    et al. 2024, arXiv 2410.17193) weights the pixels' gradient by Grad-CAM of one network; that what several
    architectures agree on be the weight is our own idea.

    Args:
        gradient: ``(N, C, H, W)``.
        shared: ``(N, I, J)`` in [0, 1], enlarged bilinearly; see :func:`shared_map`.
        focus: in [0, 1]; 0 gives ones.

    Returns:
        ``(N, 1, H, W)``; ones for an image whose weighted gradient is zero.

    Example:
        >>> focus_weights(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[0.0, 1.0]]]), 1.0)
        tensor([[[[0.0000, 1.2500]]]])
    """
    size = gradient.shape[2:]
    weights = 1 - focus + focus * F.interpolate(wide(shared)[:, None], size, mode="bilinear")
    whole, left = (values.flatten(1).norm(dim=1) for values in (wide(gradient), weights * wide(gradient)))
    gain = torch.where(left > 0, whole / left.clamp(min=_SMALLEST), 1.0)
    return torch.where((left > 0)[:, None, None, None], gain[:, None, None, None] * weights, 1.0)


def map_variance(maps: Tensor, alive: Tensor) -> Tensor:
    """Variance over architectures of the map value at the same pixel, averaged over pixels and images.

    ``1/N sum_n 1/(I J) sum_ij 1/M_n sum_m (C^m_nij - mean_nij)^2`` over the ``M_n`` live maps of image n; an image
    with fewer than two of them counts as 0. The derivative is ``2/(M_n N I J) (C^m - mean)``: the deviations sum to
    zero, so architectures are coupled through the mean alone.

    Args:
        maps: ``(M, N, I, J)`` normalised.
        alive: ``(M, N)`` bool.

    Example:
        >>> map_variance(torch.tensor([[[[0.0]]], [[[1.0]]]]), torch.ones(2, 1, dtype=torch.bool))
        tensor(0.2500)
    """
    counts = alive.sum(0)
    values = wide(maps)
    weight = ((alive & (counts >= 2)).to(values.dtype) / counts.clamp(min=1))[:, :, None, None]
    mean = (weight * values).sum(0)
    return (weight * (values - mean).square()).sum(0).mean()


def positivity(maps: Tensor, part: Partition, alive: Tensor, form: str = "meta") -> Tensor:
    """The paper's third term, whose formula is not public, in one of three readings of "positivity" or "position".

    ``meta``: how far live maps are from 1 where all of them are high, the mean of ``1 - C``: it works against maps
    that agree by being empty. ``heterogeneous``: the same where some are high and others not, which makes meta
    features of those. ``position``: the variance over architectures of the map's centre of mass, in sides of the grid.
    An image without such pixels counts as 0.

    Args:
        maps: ``(M, N, I, J)`` normalised.
        part: of these maps, a constant.
        alive: ``(M, N)`` bool.
        form: ``meta``, ``heterogeneous`` or ``position``.
    """
    if form == "position":
        return map_variance(map_centres(maps), alive)
    inside = (part.meta if form == "meta" else part.heterogeneous.any(0)) & alive[:, :, None, None]
    missing = torch.where(inside, 1 - wide(maps), 0.0).sum((0, 2, 3))
    return (missing / inside.sum((0, 2, 3)).clamp(min=1)).mean()


def map_centres(maps: Tensor) -> Tensor:
    """Return the centres of mass ``(M, N, 1, 2)`` of maps ``(M, N, I, J)``: down and right, as shares of the sides."""
    mass = wide(maps)
    total = mass.sum((2, 3)).clamp(min=_SMALLEST)
    sides = [torch.linspace(0, 1, size, dtype=mass.dtype, device=mass.device) for size in mass.shape[2:]]
    down, right = (torch.einsum(f"mnij,{axis}->mn", mass, side) / total for axis, side in zip("ij", sides, strict=True))
    return torch.stack([down, right], 2)[:, :, None]


def map_entropy(maps: Tensor) -> Tensor:
    """Mean entropy of maps ``(..., I, J)`` read as distributions, relative to ``log(I J)``. Without gradient.

    1 is a map that is the same everywhere, 0 a single pixel. The variance alone is smallest when all maps collapse to
    the same, and a jump to either end gives that away. Maps of zeros are left out; 0 if there is no other.
    """
    flat = wide(maps.detach()).flatten(-2).flatten(0, -2)
    total = flat.sum(1)
    shares = flat / total.clamp(min=_SMALLEST)[:, None]
    entropy = torch.special.entr(shares).sum(1) / math.log(flat.shape[1])
    counted = total > 0
    return torch.where(counted, entropy, 0.0).sum() / counted.sum().clamp(min=1)

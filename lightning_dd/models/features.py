"""Features of many images at once, without graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dd.models.interface import Network

_CPU_BYTES = 16 * 2**20
_GPU_BYTES = 2**30

Features = Callable[[Network, Tensor], Tensor]
"""From a network and normalised images ``(N, C, H, W)`` to features ``(N, num_features)``."""


def network_features(network: Network, images: Tensor) -> Tensor:
    """Return the network's features of channels-last images: fast, and what ``torch.compile`` is given."""
    return network.features(images.contiguous(memory_format=torch.channels_last))


def features_in_slices(network: Network, images: Tensor, features: Features = network_features) -> Tensor:
    """Return ``network.features(images)`` without graph, computed slice by slice.

    Slices are cut so that the largest activation stays near 16 MB on a CPU: larger blocks are mapped and zeroed
    afresh by the allocator at every step, which costs more than the convolutions save. On a GPU the limit is 1 GB.

    Args:
        network: in inference mode.
        images: normalised images ``(N, C, H, W)``.
        features: how one slice is computed: the plain function, or a compiled one.

    Returns:
        ``(N, network.num_features)``.
    """
    device = images.device.type
    bytes_each = 2 if torch.is_autocast_enabled(device) else images.element_size()
    width = getattr(network, "width", 64)
    per_image = width * images.shape[-2] * images.shape[-1] * bytes_each
    rows = max(1, (_CPU_BYTES if device == "cpu" else _GPU_BYTES) // per_image)
    with torch.no_grad():
        slices = [features(network, part) for part in torch.split(images, rows)]
    return slices[0] if len(slices) == 1 else torch.cat(slices)

"""What every network of the project can do, whoever wrote it."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_dd.utils.errors import UserError

_CPU_BYTES = 16 * 2**20
_GPU_BYTES = 2**30


class Network(nn.Module, ABC):
    """An image classifier whose penultimate features can be asked for.

    A network of your own is a subclass in a package of yours: ``architecture: my_package.MyNetwork:width=64`` builds
    ``MyNetwork(in_channels, num_classes, (height, width), width=64)`` wherever a name of the factory is taken. A method
    ``feature_maps(images)`` that returns the map ``(N, C, h, w)`` which ``classify`` takes flattened is used for
    class-activation maps where there is one.

    Attributes:
        num_features: length p of the feature vector.
        num_classes: number of logits.
        head: maps features to logits.
    """

    num_features: int
    num_classes: int
    head: nn.Module

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to penultimate features ``(N, num_features)``."""

    def classify(self, features: Tensor) -> Tensor:
        """Map penultimate features ``(N, num_features)`` to logits ``(N, num_classes)``."""
        logits: Tensor = self.head(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        return self.classify(self.features(images))


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
    with torch.no_grad():
        slices = [features(network, part) for part in torch.split(images, _rows_at_once(network, images))]
    return slices[0] if len(slices) == 1 else torch.cat(slices)


def logits_in_slices(network: nn.Module, images: Tensor) -> Tensor:
    """Return ``network(images)`` ``(N, num_classes)`` likewise, of any network in inference mode that is scored."""
    slices = [network(part) for part in torch.split(images, max(16, _rows_at_once(network, images)))]
    return slices[0] if len(slices) == 1 else torch.cat(slices)


def _rows_at_once(network: nn.Module, images: Tensor) -> int:
    device = images.device.type
    bytes_each = 2 if torch.is_autocast_enabled(device) else images.element_size()
    width: int = getattr(network, "width", 64)
    per_image = width * images.shape[-2] * images.shape[-1] * bytes_each
    return max(1, (_CPU_BYTES if device == "cpu" else _GPU_BYTES) // per_image)


def check_images(images: Tensor, in_channels: int) -> None:
    """Refuse a batch that is not ``(N, in_channels, H, W)``; static shapes are compared, so it costs nothing."""
    if images.ndim != 4 or images.shape[1] != in_channels:
        raise UserError(
            f"this network takes images (N, {in_channels}, H, W), got a tensor of shape {tuple(images.shape)}"
        )

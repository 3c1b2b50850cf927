"""What a split is: as read from disk, ready for a network, and what a model needs to know of it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dd.data.streamed import StreamedImages

_BLOCK = 4096  # images mapped at a time


class RawSplit(NamedTuple):
    """One decoded split: pixels as the reader found them."""

    images: Tensor
    """``(N, C, H, W)``, uint8 or float in [0, 1]; may lie in a memory-mapped file."""
    labels: Tensor
    """``(N,)`` int64 in ``[0, num_classes)``."""
    class_names: tuple[str, ...]
    """Name of each label, in label order."""


class ImageTensors(NamedTuple):
    """One split ready for a network, or a batch of it.

    Example:
        >>> split = ImageTensors(torch.arange(8.0).view(4, 1, 1, 2), torch.tensor([0, 1, 0, 1]))
        >>> split.take(torch.tensor([2])).images
        tensor([[[[4., 5.]]]])
    """

    images: Tensor
    """``(N, C, H, W)`` float32, normalised. Of a streamed split it can only be indexed by rows
    (:class:`~lightning_dd.data.streamed.StreamedImages`)."""
    labels: Tensor
    """``(N,)`` int64, on the device on which rows should be drawn."""

    def take(self, rows: Tensor, device: torch.device | str | None = None) -> "ImageTensors":
        """Return these rows, wherever the images live.

        Args:
            rows: ``(B,)`` int64 indices, or a mask ``(N,)``, on the labels' device.
            device: where the batch shall be; ``None`` leaves it where it comes from.
        """
        images, labels = self.images[rows], self.labels[rows]
        return ImageTensors(images, labels) if device is None else ImageTensors(images.to(device), labels.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "ImageTensors":
        """Return the split with ``function`` applied to its images ``(n, C, H, W)``, block by block.

        A streamed split stays streamed: the function is applied to what is read.
        """
        if isinstance(self.images, StreamedImages):
            return ImageTensors(self.images.mapped(function), self.labels)
        return ImageTensors(torch.cat([function(part) for part in torch.split(self.images, _BLOCK)]), self.labels)


@dataclass(frozen=True)
class DataFacts:
    """What a model needs to know of the data; said once, by the data."""

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    preprocessing: str
    fingerprint: str
    """Hash of the training pixels and labels (before preprocessing, so the same on every machine)."""

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for a checkpoint or a JSON header."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataFacts":
        """Rebuild from :meth:`to_dict`."""
        channels, height, width = values["image_shape"]
        return cls(
            name=values["name"],
            class_names=tuple(values["class_names"]),
            image_shape=(channels, height, width),
            preprocessing=values["preprocessing"],
            fingerprint=values["fingerprint"],
        )

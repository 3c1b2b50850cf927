"""What every network of the project can do, whoever wrote it."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Network(nn.Module, ABC):
    """An image classifier whose penultimate features can be asked for.

    Attributes:
        num_features: length p of the feature vector.
        num_classes: number of logits.
    """

    num_features: int
    num_classes: int

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to penultimate features ``(N, num_features)``."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Map penultimate features ``(N, num_features)`` to logits ``(N, num_classes)``."""

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        return self.classify(self.features(images))

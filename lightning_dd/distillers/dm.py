"""DM: distribution matching (Zhao & Bilen 2023, arXiv 2110.04181)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dd.augment.frepo import apply
from lightning_dd.data.images import Batch
from lightning_dd.distillers.matching import ClassMatching
from lightning_dd.losses.matching import batch_statistics, class_mean_distance
from lightning_dd.models.interface import Network, features_in_slices, network_features


class DM(ClassMatching):
    """Distil by matching the mean feature of every class under fresh networks.

    An outer step minimises :func:`~lightning_dd.losses.matching.class_mean_distance` of siamese-augmented real and
    synthetic images under a random, untrained network. The published runs take 20,000 outer steps. The distance grows
    with the number of features, so ``lr`` belongs to the network. No gradient reaches labels. Networks with batch
    normalisation see all classes together and use the statistics of that batch.

    Args:
        lr: learning rate of the images (the paper takes 10 for 100 and more images per class of CIFAR-10).
        augment: see :class:`~lightning_dd.distillers.matching.ClassMatching`.
        **kwargs: see :class:`~lightning_dd.distillers.matching.ClassMatching`.
    """

    label_kinds: ClassVar[tuple[str, ...]] = ("hard", "centred")

    def __init__(self, lr: float = 1.0, augment: str = "auto", **kwargs: Any) -> None:
        super().__init__(lr=lr, augment=augment, **kwargs)

    def outer_loss(self, network: Network, images: Tensor, labels: Tensor, real: Batch) -> dict[str, Tensor]:
        """Return the squared distance of mean features, summed over classes; without graph to the labels."""
        num_classes = labels.shape[1]
        draws = self.draw_siamese(num_classes)
        own, target = (
            [apply(block, draw) for block, draw in zip(batch.tensor_split(num_classes), draws, strict=True)]
            for batch in (images, real.images)
        )
        with batch_statistics(network) as batchwise:
            if batchwise:
                with torch.no_grad():
                    real_features = network_features(network, torch.cat(target))
            else:
                real_features = torch.cat([features_in_slices(network, block) for block in target])
            features = network_features(network, torch.cat(own))
        return {"means": class_mean_distance(features, real_features, num_classes)}

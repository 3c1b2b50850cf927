"""DM: distribution matching (Zhao & Bilen 2023, arXiv 2110.04181), and what has become of it since."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.augment.frepo import apply
from lightning_dd.data.images import Batch
from lightning_dd.distillers.matching import ClassMatching
from lightning_dd.losses.matching import (
    batch_statistics,
    class_characteristic_distance,
    class_mean_distance,
    class_mmd,
)
from lightning_dd.models.interface import Network, features_in_slices, network_features
from lightning_dd.models.pool import ModelPool
from lightning_dd.pretrained import ClassifierRecipe
from lightning_dd.pretrained.extractors import Extractors
from lightning_dd.utils.errors import UserError, check_range, unknown_name

DISTANCES = ("mean", "mmd", "characteristic")
EXTRACTORS = ("random", "trained", "interpolated")


class DM(ClassMatching):
    """Distil by matching the features of every class under many networks.

    An outer step minimises a distance of siamese-augmented real and synthetic images, class by class, under a network
    drawn anew. As published in 2023 that is :func:`~lightning_dd.losses.matching.class_mean_distance` under a random,
    untrained one, and runs take 20,000 outer steps. The distances differ in size, and that of means grows with the
    number of features, so ``lr`` belongs to distance and network. No gradient reaches labels. Networks with batch
    normalisation see all classes together and use the statistics of that batch.

    Later methods are settings of the same objective: ``mmd`` is M3D's distance; ``interpolated`` with ``calibration``
    is DANCE; with ``characteristic`` it is NCFM, without the network that learns NCFM's frequencies. Of several
    architectures each one's loss is scaled to its usual size (``balance``).

    Args:
        lr: learning rate of the images (the paper takes 10 for 100 and more images per class of CIFAR-10).
        augment: see :class:`~lightning_dd.distillers.matching.ClassMatching`.
        distance: ``mean``; ``mmd``, :func:`~lightning_dd.losses.matching.class_mmd`, of all moments; or
            ``characteristic``, :func:`~lightning_dd.losses.matching.class_characteristic_distance`.
        extractors: networks that are ``random``; ``trained`` on the real data once and cached; or ``interpolated``: in
            every step a random mixture of a trained network and where it was trained from.
        calibration: weight of the cross-entropy of the synthetic images on their classes, a mean over images, under
            the trained network; an ``interpolated`` one is too raw for it, so that a trained one is drawn as well.
            NCFM's weights, 1 for every class against 300 times the distance, are a thirtieth for ten classes.
        training: how a network is trained on the real data; few ``steps`` stop it early.
        experts: trained networks of every architecture.
        frequencies: random frequencies per step of ``characteristic`` (NCFM takes 4,096).
        **kwargs: see :class:`~lightning_dd.distillers.matching.ClassMatching`.

    Raises:
        UserError: a name is unknown, a number out of range, or ``calibration`` asked of random networks.
    """

    label_kinds: ClassVar[tuple[str, ...]] = ("hard", "centred")

    def __init__(
        self,
        lr: float = 1.0,
        augment: str = "auto",
        distance: str = "mean",
        extractors: str = "random",
        calibration: float = 0.0,
        training: ClassifierRecipe = ClassifierRecipe(),  # noqa: B008  (frozen)
        experts: int = 1,
        frequencies: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, augment=augment, **kwargs)
        if distance not in DISTANCES:
            raise unknown_name("distance", distance, DISTANCES)
        if extractors not in EXTRACTORS:
            raise unknown_name("extractors", extractors, EXTRACTORS)
        check_range("at least 0", calibration=calibration)
        check_range("at least 1", experts=experts, frequencies=frequencies)
        if calibration and extractors == "random":
            raise UserError("calibration needs trained networks: extractors must be trained or interpolated")
        self.distance, self.extractors, self.calibration = distance, extractors, calibration
        self.expert_recipe = ClassifierRecipe(**training) if isinstance(training, dict) else training
        self.experts, self.frequencies = experts, frequencies
        self._trained: Extractors | None = None

    def configure_pool(self, generator: torch.Generator, device: torch.device) -> ModelPool:
        """Return the pool, once the networks that it draws from are trained or read."""
        if self.extractors != "random":
            self._trained = Extractors(self.task, self.networks.names, self.expert_recipe, self.experts)
        return super().configure_pool(generator, device)

    def pool_network(self, seed: int, architecture: str) -> Network:
        """Build a fresh network, a trained one, or a mixture."""
        network = super().pool_network(seed, architecture)
        if self._trained is None:
            return network
        generator = torch.Generator().manual_seed(seed)
        return self._trained.fill(network, architecture, self.extractors == "interpolated", generator)

    def outer_loss(self, network: Network, images: Tensor, labels: Tensor, real: Batch) -> dict[str, Tensor]:
        """Return the distance, summed over classes, and the calibration if any; without graph to the labels."""
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
        terms = self._distance(features, real_features, num_classes)
        if self.calibration:
            logits = self._logits(network, features, torch.cat(own))
            terms["calibration"] = self.calibration * F.cross_entropy(logits.float(), labels.argmax(1))
        return terms

    def _distance(self, features: Tensor, real: Tensor, num_classes: int) -> dict[str, Tensor]:
        if self.distance == "mean":
            return {"means": class_mean_distance(features, real, num_classes)}
        if self.distance == "mmd":
            return {"mmd": class_mmd(features, real, num_classes)}
        generator = self.step_generator("frequencies", device=features.device)
        drawn = torch.randn(self.frequencies, features.shape[1], generator=generator, device=features.device)
        return {"characteristic": class_characteristic_distance(features, real, num_classes, drawn)}

    def _logits(self, network: Network, features: Tensor, images: Tensor) -> Tensor:
        """Return what a trained network says of images ``(n, C, H, W)``, whose features under ``network`` are known."""
        if self.extractors == "trained" or self._trained is None:
            return network.classify(features)
        expert = self._trained.draw(self.pool.current.architecture, self.step_generator("expert"))
        return expert(images.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

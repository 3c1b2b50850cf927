"""Distillers that compare the synthetic images of each class with real ones of that class."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_dd.augment.frepo import Draw
from lightning_dd.augment.siamese import siamese
from lightning_dd.data.images import Batch
from lightning_dd.data.sampling import ClassBlocks
from lightning_dd.distillers.pooled import PoolDistiller
from lightning_dd.losses.matching import batch_statistics
from lightning_dd.models.factory import Architectures
from lightning_dd.models.interface import Network
from lightning_dd.synthetic.labels import Labels
from lightning_dd.utils.errors import check_range


class ClassMatching(PoolDistiller):
    """What DC, DSA and DM share: real images by class, siamese augmentation, and how images are updated.

    The outer optimizer is SGD with momentum 0.5, the inner one SGD without. ``real_batch_size`` is not used:
    :attr:`real_per_class` takes its place.

    Args:
        architecture: the networks to distil with.
        labels: as far as the method defines them.
        lr: learning rate of the images, and of learned labels.
        real_per_class: real images of every class per outer step, at most the smallest class.
        augment: a strategy of :func:`~lightning_dd.augment.siamese.siamese`. One operation is drawn per class and outer
            step and applied to its real and synthetic images alike; inner steps draw one per batch with numbers of its
            own for every image. ``auto`` takes the published family for the data, ``none`` none.
        pool_size: networks in turn; the published methods have one.
        lifetime: inner steps a network takes before it is replaced; 0 gives every outer step a fresh, untrained one.
        inner_lr: learning rate of the inner SGD.
        inner_batch_size: synthetic images per inner step.
        **kwargs: see :class:`PoolDistiller`.
    """

    protocol: ClassVar[str] = "dsa"

    def __init__(
        self,
        architecture: Architectures = "convnet",
        labels: str | Labels = "hard",
        lr: float = 1.0,
        real_per_class: int = 256,
        augment: str = "none",
        pool_size: int = 1,
        lifetime: int = 0,
        inner_lr: float = 0.01,
        inner_batch_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            architecture=architecture,
            labels=labels,
            lr=lr,
            pool_size=pool_size,
            lifetime=lifetime,
            inner_lr=inner_lr,
            inner_batch_size=inner_batch_size,
            **kwargs,
        )
        check_range("at least 1", real_per_class=real_per_class)
        self.real_per_class, self.augment = real_per_class, augment
        self._make_augmentations()

    def setup(self, stage: str) -> None:
        """Take the augmentation for this data, too."""
        super().setup(stage)
        self._make_augmentations(self.facts.mirror)
        if stage == "fit":
            self._class_blocks = ClassBlocks(self.task.train.labels, self.facts.num_classes)

    def draw_real(self) -> Batch:
        """Draw real images in blocks by class: ``(num_classes * real_per_class, C, H, W)``, and classes."""
        train = self.task.train
        generator = self.step_generator("class blocks", device=train.labels.device)
        return train.take(self._class_blocks.draw(self.real_per_class, generator), self.device)

    def draw_siamese(self, num_classes: int) -> list[Draw]:
        """Draw one augmentation for the real and synthetic images of each class in this outer step."""
        if not self.siamese.operations:  # without a Trainer, too
            return [self.siamese.draw(torch.Generator())] * num_classes
        generator = self.step_generator("siamese")
        return [self.siamese.draw(generator) for _ in range(num_classes)]

    def draw_synthetic(self) -> tuple[Tensor, Tensor]:
        """Draw synthetic images for an inner step, augmented each with its own numbers, and labels."""
        images, labels = super().draw_synthetic()
        generator = self.step_generator("inner augmentation", self.pool.current.age)
        return self.inner_augmentation(images, generator), labels

    def configure_optimizers(self) -> Any:
        """Return SGD with momentum 0.5 on whatever the synthetic set learns."""
        return torch.optim.SGD(self.synthetic.parameter_groups(self.lr), momentum=0.5)

    def configure_inner_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return SGD without momentum."""
        return torch.optim.SGD(parameters, lr=self.inner_lr)

    def _make_augmentations(self, mirror: bool = True) -> None:
        self.siamese = siamese(self.augment, mirror)
        self.inner_augmentation = siamese(self.augment, mirror, shared=False)


@torch.no_grad()
def measure_batch_statistics(network: Network, images: Tensor, num_classes: int, count: int = 16) -> None:
    """Let batch normalisation remember the statistics of real images of all classes at once.

    A batch of one class, or of one image, would mislead it.

    Args:
        network: in inference mode, as it is afterwards; nothing happens to one without batch normalisation.
        images: normalised images in blocks of one size by class.
        num_classes: number of blocks.
        count: images of each block that are used, at most all.
    """
    with batch_statistics(network) as any_layer:
        if any_layer:
            few = torch.cat([block[:count] for block in images.tensor_split(num_classes)])
            network(few.contiguous(memory_format=torch.channels_last))

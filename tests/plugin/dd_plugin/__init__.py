"""A package of somebody else: one short class for every open axis, none of which lightning_dd knows of."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dd import PoolDistiller
from lightning_dd.augment.frepo import Augmentation
from lightning_dd.callbacks import OuterTerm
from lightning_dd.data import RawSplit, RealData
from lightning_dd.losses.metadd import MetaOptions
from lightning_dd.models import Network
from lightning_dd.synthetic import Parameterisation


class Stripes(RealData):
    """A data set: three kinds of 8 x 8 images, bright in other rows."""

    def __init__(self, contrast: int = 150, **kwargs):
        super().__init__(**kwargs)
        self.contrast = contrast

    def read(self, *, train: bool) -> RawSplit:
        labels = torch.arange(3).repeat(12)
        images = torch.randint(0, 60, (36, 1, 8, 8), generator=torch.Generator().manual_seed(int(train)))
        for label in range(3):
            images[labels == label, :, 2 * label : 2 * label + 3] += self.contrast
        return RawSplit(images.to(torch.uint8), labels, ("low", "middle", "high"))

    def spec(self):
        return super().spec() | {"contrast": self.contrast}


class TinyNet(Network):
    """A network."""

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int], width: int = 8):
        super().__init__()
        self.num_features, self.num_classes = width, num_classes
        self.body = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images).flatten(1)

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)


class Coarse(Parameterisation):
    """A parameterisation: images of half the size, enlarged."""

    def __init__(self, factor: int = 2):
        super().__init__()
        self.factor = factor

    def build(self, classes, task):
        channels, height, width = task.facts.image_shape
        self.small = nn.Parameter(torch.zeros(len(classes), channels, height // self.factor, width // self.factor))

    def start(self, init, train, ipc, generator):
        self.small.data.copy_(torch.randn(self.small.shape, generator=generator))

    def render(self):
        return nn.functional.interpolate(self.small, scale_factor=self.factor, mode="nearest")


class MeanFeatures(PoolDistiller):
    """A distiller: match the mean feature of all images, which are augmented first."""

    def __init__(self, *args, augment: str = "none", **kwargs):
        super().__init__(*args, **kwargs)
        self.augmentation = Augmentation(augment)

    def outer_loss(self, network, images, labels, real):
        seen = self.augmentation(images, self.step_generator("augment"))
        own, target = network.features(seen).mean(0), network.features(real.images).mean(0)
        return {"means": (own - target).square().sum()}


class Calm(OuterTerm):
    """An outer term: neighbouring pixels should be alike."""

    def __init__(self, weight: float = 0.1):
        self.weight = weight

    def add(self, trainer, distiller, images, labels, loss):
        return loss, {"calm": self.weight * images.diff(dim=-1).square().mean()}


@dataclass(frozen=True)
class Sharp(MetaOptions):
    """A term of MetaDD: every map should point at few places."""

    sharp: float = 0.1

    def more_terms(self, maps, alive, logits, labels):
        return {"sharp": maps.mean()}


def darken(images: Tensor, generator: torch.Generator) -> Tensor:
    """An augmentation: every image is a little darker."""
    return images - 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)

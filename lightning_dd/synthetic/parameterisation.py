"""What the images of a synthetic set are learned through: the base of every parameterisation, and pixels."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dd.data.images import Split
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.pretrained.task import Task
from lightning_dd.utils.arguments import RemembersArguments


class Parameterisation(RemembersArguments, nn.Module, ABC):
    """The learnable tensors of a synthetic set, and the images they make.

    An object is made with its options alone, as in ``parameterisation: {class_path: Latents, init_args: {level: 2}}``.
    Once the data is known, :meth:`build` makes the tensors; rows are in blocks of ``ipc`` by class. A subclass answers
    :meth:`build`, :meth:`start` and :meth:`render`.
    """

    @abstractmethod
    def build(self, classes: Tensor, task: Task) -> None:
        """Make the learnable tensors, as parameters of this module.

        Args:
            classes: ``(n,)`` int64, the class of each image.
            task: what is distilled: image shape, classes, preprocessing.
        """

    @abstractmethod
    def start(self, init: str, train: Split, ipc: int, generator: torch.Generator) -> None:
        """Fill the tensors for a first fit.

        Args:
            init: ``real`` or ``noise``.
            train: the training images.
            ipc: images per class.
            generator: CPU generator of the draw.

        Raises:
            UserError: a class has fewer than ``ipc`` images.
        """

    @abstractmethod
    def render(self) -> Tensor:
        """Return the images ``(n, C, H, W)``, normalised, with graph to what is learned."""

    def prepare(self, task: Task) -> None:
        """Train or load what the images depend on, before :meth:`start`; by default there is nothing."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return all that is learned as an optimizer's parameter groups, each with its learning rate.

        Args:
            lr: the outer learning rate, of which a group may take a multiple.
        """
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad], "lr": lr}]

    def clip(self, preprocessing: Preprocessing) -> None:
        """Bring images back to what pixels in [0, 1] can be, where images are learned directly."""


class Pixels(Parameterisation):
    """The images themselves are learned, in normalised space; nothing clips them unless the method does.

    Attributes:
        images: ``(n, C, H, W)`` parameter.
    """

    def build(self, classes: Tensor, task: Task) -> None:
        """Make the images, all zero."""
        self.images = nn.Parameter(torch.zeros(len(classes), *task.facts.image_shape))

    def start(self, init: str, train: Split, ipc: int, generator: torch.Generator) -> None:
        """Start from ``ipc`` real images per class, drawn without replacement, or from standard normal noise."""
        with torch.no_grad():
            if init == "real":
                num_classes = len(self.images) // ipc
                self.images.copy_(train.take(draw_per_class(train.labels, ipc, num_classes, generator)).images)
            else:
                self.images.copy_(torch.randn(self.images.shape, generator=generator))

    def render(self) -> Tensor:
        """Return the images."""
        return self.images

    def clip(self, preprocessing: Preprocessing) -> None:
        """Clip the pixels to [0, 1]; whitened images are un-whitened, clipped and whitened again."""
        with torch.no_grad():
            self.images.copy_(preprocessing.clipped(self.images))

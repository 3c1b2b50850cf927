"""The synthetic set, and what its images are learned through: the base of every parameterisation, and pixels."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dd.data.images import Split
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distilled.multiformation import MultiFormed
from lightning_dd.losses.krr import initial_labels
from lightning_dd.pretrained.task import Task
from lightning_dd.utils.arguments import RemembersArguments


class Parameterisation(RemembersArguments, nn.Module, ABC):
    """The learnable tensors of a synthetic set, and the images they make.

    An object is made with its options alone, as in ``parameterisation: {class_path: Latents, init_args: {level: 2}}``,
    and remembers them for the file. A run then calls, in this order: :meth:`build` to make the tensors, :meth:`prepare`
    and :meth:`start` to fill them (a resumed run loads them instead), and :meth:`render` in every outer step. Images
    stand in blocks of equal size by class, classes in order, and live in the data's normalised space.

    Example:
        Images of half the size, enlarged; ``parameterisation: my_package.Coarse`` uses them.

        >>> class Coarse(Parameterisation):
        ...     def build(self, classes, task):
        ...         channels, height, width = task.facts.image_shape
        ...         self.small = nn.Parameter(torch.zeros(len(classes), channels, height // 2, width // 2))
        ...
        ...     def start(self, init, train, ipc, generator):
        ...         self.small.data.copy_(torch.randn(self.small.shape, generator=generator))
        ...
        ...     def render(self):
        ...         return nn.functional.interpolate(self.small, scale_factor=2)
    """

    shown_per_stored: int = 1
    """Images that are rendered for each of the ``ipc`` of a class."""

    @abstractmethod
    def build(self, classes: Tensor, task: Task) -> None:
        """Make the learnable tensors, as parameters of this module, of shapes that ``classes`` and ``task`` fix.

        Args:
            classes: ``(n,)`` int64, the class of each image.
            task: what is distilled: ``task.facts.image_shape`` is ``(C, H, W)``, ``task.facts.num_classes`` the number
                of classes, and ``task.preprocessing`` maps pixels in [0, 1] to the normalised space.
        """

    @abstractmethod
    def start(self, init: str, train: Split, ipc: int, generator: torch.Generator) -> None:
        """Fill the tensors for a first fit.

        Args:
            init: ``real`` or ``noise``, as far as it has a meaning.
            train: the training images; ``train.take(rows).images`` are normalised, ``train.labels`` their classes.
            ipc: images per class that are rendered.
            generator: CPU generator, to be the only source of random numbers.

        Raises:
            UserError: a class has fewer than ``ipc`` images.
        """

    @abstractmethod
    def render(self) -> Tensor:
        """Return the images ``(n, C, H, W)``, normalised, with graph to what is learned."""

    def stored(self) -> MultiFormed | None:
        """Return what a file keeps in place of the images, on the CPU; ``None`` for the images themselves."""
        return None

    def prepare(self, task: Task) -> None:
        """Train or load what the images depend on, as a generator; by default there is nothing."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return all that is learned as an optimizer's parameter groups, each with its learning rate.

        Args:
            lr: the outer learning rate, of which a group may take a multiple.
        """
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad], "lr": lr}]

    def clip(self, preprocessing: Preprocessing) -> None:
        """Bring images back to what pixels in [0, 1] can be, where images are learned directly."""


class ImageSpace(Parameterisation):
    """A parameterisation that images can be put into: a start from real ones, or those that a method selects.

    A subclass answers :meth:`build`, :meth:`encode` and :meth:`render`.
    """

    @abstractmethod
    def encode(self, images: Tensor) -> None:
        """Fill the tensors so that images ``(n, C, H, W)``, normalised, are rendered as nearly as can be."""

    @torch.no_grad()
    def start(self, init: str, train: Split, ipc: int, generator: torch.Generator) -> None:
        """Start from real images, drawn without replacement where there are enough, or from standard normal noise.

        Raises:
            UserError: a class has fewer than ``ipc`` images, and one is rendered for each that is stored.
        """
        if init == "real":
            num_classes, repeat = len(self.render()) // ipc, self.shown_per_stored > 1
            self.encode(
                train.take(draw_per_class(train.labels, ipc, num_classes, generator, repeat, train.class_names)).images
            )
        else:
            self.start_from_noise(generator)

    def start_from_noise(self, generator: torch.Generator) -> None:
        """Render standard normal noise, by a CPU generator."""
        self.encode(torch.randn(self.render().shape, generator=generator))


class Pixels(ImageSpace):
    """The images themselves are learned, in normalised space; nothing clips them unless the method does.

    Attributes:
        images: ``(n, C, H, W)`` parameter.
    """

    def build(self, classes: Tensor, task: Task) -> None:
        """Make the images, all zero."""
        self.images = nn.Parameter(torch.zeros(len(classes), *task.facts.image_shape))

    @torch.no_grad()
    def encode(self, images: Tensor) -> None:
        """Take the images as they are."""
        self.images.copy_(images)

    def render(self) -> Tensor:
        """Return the images."""
        return self.images

    def clip(self, preprocessing: Preprocessing) -> None:
        """Clip the pixels to [0, 1]; whitened images are un-whitened, clipped and whitened again."""
        with torch.no_grad():
            self.images.copy_(preprocessing.clipped(self.images))


class SyntheticSet(nn.Module):
    """Images that a parameterisation makes, and labels, in blocks of equal size by class, classes in order.

    There is a row for every image that is shown: ``ipc``, or several times as many where several are made of one.

    Images live in normalised space. Labels start from :func:`~lightning_dd.losses.krr.initial_labels`; those of the
    kinds ``learned`` and ``soft`` (logits) are a parameter, the others are fixed.

    Args:
        parameterisation: what the images are learned through; its tensors are made here.
        ipc: images per class that are stored, at least 1.
        label_kind: ``learned``, ``soft``, ``centred`` or ``hard``.
        task: what is distilled.

    Attributes:
        labels: ``(n, C)`` parameter, or buffer when fixed.
        classes: ``(n,)`` int64 buffer, the class each row belongs to.
    """

    labels: Tensor
    classes: Tensor

    def __init__(self, parameterisation: Parameterisation, ipc: int, label_kind: str, task: Task) -> None:
        super().__init__()
        num_classes = task.facts.num_classes
        self.label_kind, shown = label_kind, ipc * parameterisation.shown_per_stored
        self.register_buffer("classes", torch.arange(num_classes).repeat_interleave(shown), persistent=False)
        parameterisation.build(self.classes, task)
        self.parameterisation = parameterisation
        labels = initial_labels(self.classes, num_classes, label_kind)
        if label_kind in ("learned", "soft"):
            self.labels = nn.Parameter(labels)
        else:
            self.register_buffer("labels", labels)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def images(self) -> Tensor:
        """The images ``(n, C, H, W)``, normalised, with graph to what is learned."""
        return self.parameterisation.render()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return images ``(n, C, H, W)``, normalised, and labels ``(n, num_classes)``."""
        return self.images, self.labels

    def parameter_groups(self, lr: float, label_lr: float | None = None) -> list[dict[str, Any]]:
        """Return all that is learned as an outer optimizer's parameter groups, each with its learning rate.

        Args:
            lr: the outer learning rate.
            label_lr: that of learned labels; ``None`` is the same.
        """
        groups = self.parameterisation.parameter_groups(lr)
        if not isinstance(self.labels, nn.Parameter):
            return groups
        if label_lr is None and len(groups) == 1:
            return [{**groups[0], "params": [*groups[0]["params"], self.labels]}]
        return [*groups, {"params": [self.labels], "lr": lr if label_lr is None else label_lr, "name": "labels"}]

"""Several images in the bytes of one (IDC: Kim et al. 2022, arXiv 2205.14959)."""

import torch
from torch import Tensor, nn

from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.distilled.multiformation import MultiFormed, check_factor
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic.parameterisation import ImageSpace


class MultiFormation(ImageSpace):
    """Images whose parts are learned: each is cut into ``factor x factor``, and the parts enlarged to full size.

    With ``ipc`` images stored for a class, methods and students see ``ipc * factor**2``, each with a label of its own.
    They are coarser and more, which helps most where few are stored. A start from real images shrinks each to a part.
    ZCA-whitened images are learned before the whitening. File, ``ipc`` and tables count the stored ones.

    Args:
        factor: parts along a side, 2 to 8; the paper takes 2 for small images and 3 for large ones.

    Attributes:
        images: ``(n / factor**2, C, H, W)`` parameter, standardised by channel.

    Raises:
        UserError: (also in :meth:`build`) the factor is out of range, or larger than the images.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        check_factor(factor)
        self.factor = factor
        self.shown_per_stored = factor**2

    def build(self, classes: Tensor, task: Task) -> None:
        """Make the stored images, all zero."""
        self._preprocessing = task.preprocessing
        self.images = nn.Parameter(torch.zeros(len(classes) // self.factor**2, *task.facts.image_shape))
        MultiFormed(self.images, self.factor)  # refuses a factor that the images cannot have

    @torch.no_grad()
    def encode(self, images: Tensor) -> None:
        """Shrink images to parts."""
        self.images.copy_(MultiFormed.of(images, self.factor, self._here()).images)

    def start_from_noise(self, generator: torch.Generator) -> None:
        """Fill the stored images with standard normal noise: shrunk, it would lose its variance."""
        self.images.copy_(torch.randn(self.images.shape, generator=generator))

    def render(self) -> Tensor:
        """Return the enlarged parts."""
        return MultiFormed(self.images, self.factor).shown(self._here())

    def stored(self) -> MultiFormed:
        """Return the learned images, on the CPU."""
        return MultiFormed(self.images.detach().cpu().clone().contiguous(), self.factor)

    @torch.no_grad()
    def clip(self, preprocessing: Preprocessing) -> None:
        """Clip the stored pixels to [0, 1]."""
        self.images.copy_(Preprocessing(preprocessing.mean, preprocessing.std).clipped(self.images))

    def _here(self) -> Preprocessing:
        self._preprocessing = self._preprocessing.to(self.images.device)
        return self._preprocessing

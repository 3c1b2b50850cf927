"""Images as sums of levels from coarse to fine, in colours of their own (Cazenavette et al. 2025, arXiv 2511.16674)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dd.data.images import Split
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic.parameterisation import ImageSpace
from lightning_dd.utils.errors import UserError, check_range

_FEWEST, _PIXELS = 50, 2**21
"""Training images whose colours are measured: as many as have so many pixels, but no fewer."""
_SMALLEST = 1e-2
"""Least variance of a colour relative to the mean one: grey images stored in three channels have one colour only."""


class Pyramid(ImageSpace):
    """Images that are sums of levels, each of half the finer one's sides and enlarged (bilinear).

    A step moves coarse structure more than fine detail, and what is distilled shows less of the noise that one network
    alone reacts to. The gradient of a level is divided by the pixels that each of its own covers, and by the number of
    levels: under SGD coarse structure then moves as much as with pixels, and the finest detail by that number less, so
    that the method's learning rate stays usable; under Adam and LAMB the levels move alike.

    Colours are learned in a basis in which those of the training images are uncorrelated and of variance 1: channels
    move together where they do in photographs. Any image can be said, so that a start from real images, or from noise,
    renders what it does for :class:`~lightning_dd.synthetic.Pixels`; the file holds the sums. ZCA-whitened images are
    learned before the whitening. (The paper adds its finer levels one by one as a run goes on, and bounds pixels by a
    sigmoid; here all are there from the start.)

    Args:
        levels: how many, the finest of full size; ``None`` goes down to one pixel.
        decorrelate: learn in the basis of uncorrelated colours; otherwise in the channels.

    Attributes:
        level0: and so on, coarse to fine: parameters ``(n, C, h, w)``.
        colours: ``(C, C)`` buffer, symmetric: from the basis to standardised channels.

    Raises:
        UserError: (also in :meth:`build`) there are fewer than 1 or more levels than can be halved.
    """

    colours: Tensor

    def __init__(self, levels: int | None = None, decorrelate: bool = True) -> None:
        super().__init__()
        check_range("at least 1", "pyramid: ", levels=levels)
        self.wanted, self.decorrelate = levels, decorrelate

    def build(self, classes: Tensor, task: Task) -> None:
        """Make the levels, all zero, with the channels as colours."""
        self._preprocessing = task.preprocessing
        channels, height, width = task.facts.image_shape
        most = (max(height, width) - 1).bit_length() + 1
        self.count = self.wanted or most
        if self.count > most:
            raise UserError(f"pyramid: levels must be at most {most} for images of {height}x{width}, got {self.count}")
        for place, halved in enumerate(reversed(range(self.count))):
            shape = len(classes), channels, -(-height // 2**halved), -(-width // 2**halved)
            self.register_parameter(f"level{place}", nn.Parameter(torch.zeros(shape)))
        self.register_buffer("colours", torch.eye(channels))

    @property
    def levels(self) -> list[Tensor]:
        """The levels, coarse to fine."""
        return [getattr(self, f"level{place}") for place in range(self.count)]

    @torch.no_grad()
    def start(self, init: str, train: Split, ipc: int, generator: torch.Generator) -> None:
        """Start from real images or from noise, and say them in the colours of training images."""
        super().start(init, train, ipc, generator)
        if self.decorrelate:
            images = self.render()
            self.colours.copy_(_decorrelating(train))
            self.encode(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> None:
        """Take means over areas for the coarsest level, and for each finer one those of what is missing."""
        rest = self._recoloured(self._here().unwhiten(images.to(self.colours.device)), torch.linalg.inv(self.colours))
        for level in self.levels:
            level.copy_(F.interpolate(rest, (level.shape[2], level.shape[3]), mode="area"))
            rest = rest - self._enlarged(level)

    def render(self) -> Tensor:
        """Return the sums of the enlarged levels."""
        with torch.autocast(self.colours.device.type, enabled=False):
            total = torch.stack([self._enlarged(self._damped(level)) for level in self.levels]).sum(0)
            return self._here().whiten(self._recoloured(total, self.colours))

    @torch.no_grad()
    def clip(self, preprocessing: Preprocessing) -> None:
        """Clip the pixels to [0, 1]; the finest level takes up the difference."""
        images = self.render()
        change = preprocessing.unwhiten(preprocessing.clipped(images)) - preprocessing.unwhiten(images)
        self.levels[-1].add_(self._recoloured(change, torch.linalg.inv(self.colours)))

    def _damped(self, level: Tensor) -> Tensor:
        """Return a level whose gradient is divided by pixels covered and levels; its values are what they are."""
        share = level.shape[2:].numel() / self.levels[-1].shape[2:].numel() / self.count
        fixed = level.detach()
        return fixed + share * (level - fixed)

    def _enlarged(self, level: Tensor) -> Tensor:
        height, width = self.levels[-1].shape[2:]
        enlarged: Tensor = F.interpolate(level, (height, width), mode="bilinear")  # the finest stays as it is
        return enlarged

    @staticmethod
    def _recoloured(images: Tensor, matrix: Tensor) -> Tensor:
        mixed: Tensor = torch.einsum("nchw,cd->ndhw", images, matrix)
        return mixed

    def _here(self) -> Preprocessing:
        self._preprocessing = self._preprocessing.to(self.colours.device)
        return self._preprocessing


def _decorrelating(train: Split) -> Tensor:
    """Return the symmetric root ``(C, C)`` of the covariance of training colours, in standardised channels."""
    count = max(_FEWEST, _PIXELS // train.image_shape[1] // train.image_shape[2])
    rows = torch.arange(0, len(train), max(1, len(train) // count))  # from all of a set that is in order of classes
    into = train.preprocessing
    colours = torch.cat(
        [
            (part if into is None else into.unwhiten(part)).transpose(0, 1).flatten(1).double().cpu()
            for part in (train.take(some).images for some in torch.split(rows, _FEWEST))
        ],
        1,
    )
    values, vectors = torch.linalg.eigh(torch.cov(colours).view(len(colours), -1))
    values = values.clamp(min=_SMALLEST * float(values.mean()))
    root: Tensor = (vectors * values.sqrt()) @ vectors.T
    return root.float()

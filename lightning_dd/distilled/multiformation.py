"""Stored images that each stand for several: multi-formation (IDC: Kim et al. 2022, arXiv 2205.14959)."""

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.utils.errors import UserError

LARGEST_FACTOR = 8
"""What a file may ask for: 64 images shown for one that is stored. The paper takes 2 and 3."""
_NAME = "multiformation"  # in a file, beside the factor


@dataclass(frozen=True)
class MultiFormed:
    """Stored images, each of which is cut into ``factor x factor`` parts that are enlarged to its own size.

    Sides that the factor does not divide are cut at the nearest whole pixels, so nothing is padded.

    Args:
        images: ``(m, C, H, W)`` float32, standardised by channel. Whitened data is whitened after the enlarging, for
            the matrix is one of whole images; other data is thus in its own normalised space.
        factor: parts along a side.

    Raises:
        UserError: the factor is not from 2 to 8, or larger than a side.
    """

    images: Tensor
    factor: int

    def __post_init__(self) -> None:
        check_factor(self.factor, min(LARGEST_FACTOR, *self.images.shape[2:]))

    @classmethod
    def of(cls, images: Tensor, factor: int, preprocessing: Preprocessing) -> "MultiFormed":
        """Store images ``(m * factor**2, C, H, W)``, normalised: each shrinks to its part by means over areas."""
        images = preprocessing.unwhiten(images)
        kept = cls(torch.empty(len(images) // factor**2, *images.shape[1:], device=images.device), factor)
        for place, (down, across) in enumerate(kept._parts()):
            size = down.stop - down.start, across.stop - across.start
            kept.images[:, :, down, across] = F.interpolate(images[place :: factor**2], size, mode="area")
        return kept

    def shown(self, preprocessing: Preprocessing) -> Tensor:
        """Return the images ``(m * factor**2, C, H, W)``, normalised, with graph: the parts of one, row by row, first.

        Example:
            >>> stored = torch.arange(4.0).view(1, 1, 2, 2)
            >>> MultiFormed(stored, 2).shown(Preprocessing([0.0], [1.0])).flatten(1).mean(1)
            tensor([0., 1., 2., 3.])
        """
        size = self.images.shape[2:]
        parts = [
            F.interpolate(self.images[:, :, down, across], size, mode="bilinear") for down, across in self._parts()
        ]
        return preprocessing.whiten(torch.stack(parts, 1).flatten(0, 1))

    def header(self) -> dict[str, Any]:
        """Return what a file says of the images."""
        return {"name": _NAME, "factor": self.factor}

    @classmethod
    def read(cls, images: Tensor, header: Any, rows: int) -> "MultiFormed":
        """Rebuild from what a file says.

        Args:
            images: the stored ones.
            header: as :meth:`header` wrote it.
            rows: labels in the file, which tell how many images are going to be made before any is.

        Raises:
            UserError: the decoding is not known, or does not fit.
        """
        if not isinstance(header, dict) or header.get("name") != _NAME:
            raise UserError(f"distilled set: the decoding of stored images must be {_NAME}, got {header!r}")
        if images.ndim != 4 or images.numel() == 0:
            raise UserError(f"distilled set: stored images of shape {tuple(images.shape)} are none")
        kept = cls(images, header.get("factor"))  # type: ignore[arg-type]  # which is checked there
        if len(images) * kept.factor**2 != rows:
            raise UserError(f"distilled set: {len(images)} stored images at factor {kept.factor}, and {rows} labels")
        return kept

    def _parts(self) -> list[tuple[slice, slice]]:
        """Return rows and columns of each part."""
        cuts = [[round(side * cut / self.factor) for cut in range(self.factor + 1)] for side in self.images.shape[2:]]
        down, across = ([slice(*ends) for ends in pairwise(edges)] for edges in cuts)
        return list(product(down, across))


def check_factor(factor: Any, largest: int = LARGEST_FACTOR) -> None:
    """Refuse a factor that no image can have, or that these images cannot have."""
    if isinstance(factor, bool) or not isinstance(factor, int) or not 2 <= factor <= largest:
        raise UserError(f"multi-formation: factor must be a whole number from 2 to {largest}, got {factor!r}")

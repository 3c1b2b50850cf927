"""RDED: realistic, diverse and efficient sets without any optimisation (Sun et al. 2024, arXiv 2312.03526)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.augment.crops import draw_crops
from lightning_dd.data.images import Split
from lightning_dd.distillers.selection import SelectionDistiller
from lightning_dd.synthetic.labels import Labels, TeacherLabels
from lightning_dd.utils.arguments import revive
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.seeding import make_generator

_IMAGES = 64
"""Candidates that are cropped at a time."""


class RDED(SelectionDistiller):
    """Build images of the crops of real images that the teacher is surest of.

    For every class, ``candidates`` real images are drawn, and ``crops`` square random crops of each are brought to the
    size of a tile. The teacher, which sees each in the middle of the mean colour, keeps the crop of every image with
    the least cross-entropy, and then the ``patches^2`` best of these for each image; every ``patches^2`` are tiled into
    one. Crops and tiles are made of pixels and normalised afterwards, so whitened data is whitened as whole
    images. All of it happens once, and the teacher's soft labels follow.

    Crops are of images as the data set decodes them; the paper's are of the original files, whose sides are longer and
    not cut off (``synthesize/utils.py``). At 32 and 64 pixels there is no difference.

    Args:
        candidates: real images drawn of every class, at most all it has.
        crops: random crops of each.
        patches: tiles along a side of an image: 1 for small images, 2 for large ones.
        crop_min_scale: smallest area of a crop as a share of the image's.
        labels: ``soft`` for the teacher's, whose views shuffle the tiles and keep a ``1 / patches`` of the
            area at least; ``hard`` or ``centred``.
        **kwargs: see :class:`TeacherDistiller`.

    Raises:
        UserError: (also in ``setup``) there are too few candidates, or an image cannot be tiled.
    """

    def __init__(
        self,
        candidates: int = 300,
        crops: int = 5,
        patches: int = 1,
        crop_min_scale: float = 0.08,
        labels: str | Labels = "soft",
        **kwargs: Any,
    ) -> None:
        check_range("at least 1", candidates=candidates, crops=crops, patches=patches)
        check_range("in (0, 1]", crop_min_scale=crop_min_scale)
        labels = TeacherLabels() if labels == "soft" else revive(labels)
        if isinstance(labels, TeacherLabels):
            # validation/main.py: RandomResizedCrop(scale=(1 / factor, 1)), which is the whole image where it is one
            # tile, after ShufflePatches(factor).
            own: dict[str, Any] = {"min_scale": 1 / patches, "tiles": patches, "protocol": "rded"}
            labels = TeacherLabels(**(own | labels.init_args))
        super().__init__(labels=labels, **kwargs)
        self.candidates, self.crops, self.patches, self.crop_min_scale = candidates, crops, patches, crop_min_scale

    def select(self, train: Split) -> Tensor:
        """Choose the surest crops of every class and tile them."""
        facts = self.facts
        if any(side % self.patches for side in facts.image_shape[1:]):
            raise UserError(f"patches={self.patches} do not divide images of {facts.image_shape[1:]} pixels")
        generator = make_generator(self.seed, "candidates")
        made = []
        for label in range(facts.num_classes):
            rows = (train.labels == label).nonzero().flatten()
            order = torch.randperm(len(rows), generator=generator)[: self.candidates]
            needed = self.shown_ipc * self.patches**2
            if needed > len(order):
                raise UserError(
                    f"ipc={self.ipc} with patches={self.patches} needs {needed} candidates of every class, and class "
                    f"{label} has {len(order)}"
                )
            height, width = facts.image_shape[1:]
            boxes = draw_crops(len(order) * self.crops, (height, width), self.crop_min_scale, generator, ratio=1.0)
            boxes = (boxes * torch.tensor([width, height, width, height])).round().int()
            pixels = train.pixels(rows[order.to(rows.device)]).to(self.task.device)
            made.append(self.best_crops(pixels, boxes, label, needed))
        tiled = torch.cat([tile(pixels, self.patches) for pixels in made])
        return self.task.preprocessing(tiled)

    def best_crops(self, pixels: Tensor, boxes: Tensor, label: int, count: int) -> Tensor:
        """Return the ``count`` surest crops of one class as pixels ``(count, C, H / patches, W / patches)``.

        Args:
            pixels: candidates ``(N, C, H, W)``.
            boxes: ``(N * crops, 4)`` in pixels, those of an image side by side.
            label: their class.
            count: at most N.
        """
        best, losses = [], []
        for images, places in zip(torch.split(pixels, _IMAGES), torch.split(boxes, _IMAGES * self.crops), strict=True):
            cut = self.cut(images, places)
            logits = self.committee().logits(self.shown(cut))
            target = torch.full((len(cut),), label, device=logits.device)
            loss = F.cross_entropy(logits, target, reduction="none").view(len(images), self.crops).min(1)
            first = self.crops * torch.arange(len(images), device=cut.device)
            best.append(cut[first + loss.indices.to(cut.device)])
            losses.append(loss.values)
        chosen = torch.cat(losses).argsort(stable=True)[:count]  # the surest first
        return torch.cat(best)[chosen.to(pixels.device)]

    def cut(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        """Return crops at the size of a tile, resized as torchvision does; arguments as for :meth:`best_crops`."""
        size = [side // self.patches for side in pixels.shape[2:]]
        crops = [
            pixels[place // self.crops, None, :, top : top + height, left : left + width]
            for place, (left, top, width, height) in enumerate(boxes.tolist())
        ]
        return torch.cat([F.interpolate(crop, size, mode="bilinear", antialias=True) for crop in crops])

    def shown(self, tiles: Tensor) -> Tensor:
        """Return what the teacher sees of tiles: each, normalised, in the middle of zeros as large as an image."""
        (height, width), (high, wide) = self.facts.image_shape[1:], tiles.shape[2:]
        top, left = (height - high) // 2, (width - wide) // 2
        mean = self.task.preprocessing.inverse(torch.zeros(1, *self.facts.image_shape, device=tiles.device))
        canvas = mean.repeat(len(tiles), 1, 1, 1)
        canvas[:, :, top : top + high, left : left + wide] = tiles
        return self.task.preprocessing(canvas)


def tile(pixels: Tensor, patches: int) -> Tensor:
    """Tile ``(n * patches^2, C, h, w)`` into ``(n, C, patches * h, patches * w)``.

    The i-th image takes those at i, n + i, 2n + i, ..., row by row, so that the best are spread over the images.

    Example:
        >>> tile(torch.arange(4.0).view(4, 1, 1, 1), 2)
        tensor([[[[0., 1.],
                  [2., 3.]]]])
    """
    channels, height, width = pixels.shape[1:]
    grid = pixels.view(patches, patches, -1, channels, height, width)
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(-1, channels, patches * height, patches * width)

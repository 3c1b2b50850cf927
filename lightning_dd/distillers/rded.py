"""RDED: realistic, diverse and efficient sets without any optimisation (Sun et al. 2024, arXiv 2312.03526)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.augment.crops import draw_crops
from lightning_dd.data.images import Split
from lightning_dd.data.preprocess import to_unit
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

    Crops are of the original files where those are larger than the images (``synthesize/utils.py``), which are read
    once more, in their order; data of an own folder with ``skip_broken`` is cropped as it was decoded.

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
        larger = train.whole is not None and next(train.whole(torch.tensor([0]))).shape != facts.image_shape
        made = (self.from_files if larger else self.from_pixels)(train, generator)
        tiled = torch.cat([tile(pixels, self.patches) for pixels in made])
        return self.task.preprocessing(tiled)

    def from_pixels(self, train: Split, generator: torch.Generator) -> list[Tensor]:
        """Return the surest crops of each class, ``(shown_ipc * patches^2, C, H / patches, W / patches)`` in [0, 1]."""
        made = []
        for label in range(self.facts.num_classes):
            rows = self.candidates_of(train, label, generator)
            height, width = self.facts.image_shape[1:]
            boxes = self.boxes(len(rows) * self.crops, height, width, generator)
            pixels = train.pixels(rows).to(self.task.device)
            target = torch.full((len(rows),), label)
            parts = (torch.split(part, size) for part, size in ((pixels, _IMAGES), (boxes, _IMAGES * self.crops)))
            found = [self.surest(*some) for some in zip(*parts, torch.split(target, _IMAGES), strict=True)]
            best, losses = (torch.cat(values) for values in zip(*found, strict=True))
            chosen = losses.argsort(stable=True)[: self.needed]  # the surest first
            made.append(best[chosen.to(best.device)])
        return made

    def from_files(self, train: Split, generator: torch.Generator) -> list[Tensor]:
        """Return what :meth:`from_pixels` does, cut from the original files: one pass over them, class by class or not.

        Never more than the surest crops so far are kept of a class.
        """
        assert train.whole is not None
        classes = range(self.facts.num_classes)
        drawn = torch.cat([self.candidates_of(train, label, generator) for label in classes]).sort().values.cpu()
        kept: list[list[tuple[float, int, Tensor]]] = [[] for _ in classes]
        files = train.whole(drawn)
        for rows in torch.split(drawn, _IMAGES):
            images = [to_unit(next(files)).to(self.task.device) for _ in rows]
            boxes = torch.cat([self.boxes(self.crops, image.shape[1], image.shape[2], generator) for image in images])
            labels = train.labels[rows.to(train.labels.device)].cpu()
            best, losses = self.surest(images, boxes, labels)
            for label, loss, row, crop in zip(labels.tolist(), losses.tolist(), rows.tolist(), best.cpu(), strict=True):
                kept[label].append((loss, row, crop.clone()))
                kept[label].sort(key=lambda found: found[:2])
                del kept[label][self.needed :]
        return [torch.stack([crop for _, _, crop in own]).to(self.task.device) for own in kept]

    @property
    def needed(self) -> int:
        """Crops of every class that are kept."""
        return self.shown_ipc * self.patches**2

    def candidates_of(self, train: Split, label: int, generator: torch.Generator) -> Tensor:
        """Draw rows of a class."""
        rows = (train.labels == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=generator)[: self.candidates]
        if self.needed > len(order):
            raise UserError(
                f"ipc={self.ipc} with patches={self.patches} needs {self.needed} candidates of every class, and class "
                f"{label} has {len(order)}"
            )
        return rows[order.to(rows.device)]

    def boxes(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw square crops ``(count, 4)`` of an image, in pixels: left, top, width, height."""
        boxes = draw_crops(count, (height, width), self.crop_min_scale, generator, ratio=1.0)
        return (boxes * torch.tensor([width, height, width, height])).round().int()

    def surest(self, images: Sequence[Tensor] | Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the surest crop of every image, ``(N, C, H / patches, W / patches)`` in [0, 1], and its loss ``(N,)``.

        Args:
            images: N of ``(C, h, w)``, pixels in [0, 1].
            boxes: ``(N * crops, 4)`` in pixels, those of an image side by side.
            labels: ``(N,)``.
        """
        cut = self.cut(images, boxes)
        logits = self.committee().logits(self.shown(cut))
        target = labels.to(logits.device).repeat_interleave(self.crops)
        loss = F.cross_entropy(logits, target, reduction="none").view(len(images), self.crops).min(1)
        first = self.crops * torch.arange(len(images), device=cut.device)
        return cut[first + loss.indices.to(cut.device)], loss.values

    def cut(self, images: Sequence[Tensor] | Tensor, boxes: Tensor) -> Tensor:
        """Return crops at the size of a tile, resized as torchvision does; arguments as for :meth:`surest`."""
        size = [side // self.patches for side in self.facts.image_shape[1:]]
        crops = [
            images[place // self.crops][None, :, top : top + height, left : left + width]
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

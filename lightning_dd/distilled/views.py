"""What students see of a distilled set, step by step: its rows, or stored views of them. Plain torch.

SRe2L (Yin et al. 2023, arXiv 2306.13092) and RDED (Sun et al. 2024, arXiv 2312.03526) train students on crops and
CutMix mixtures that the teacher labelled one by one (Shen & Xing 2022, arXiv 2112.01528). A view is kept as the
numbers that make it, so the student's batch size is free and any machine can make the view again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_dd.augment.crops import draw_crops, draw_padded, resample
from lightning_dd.data.sampling import ShuffledStream
from lightning_dd.utils.errors import UserError, check_range, unknown_name
from lightning_dd.utils.seeding import make_generator

_DTYPES = {
    "crops": torch.float32,
    "flips": torch.bool,
    "partners": torch.int32,
    "pastes": torch.int16,
    "logits": torch.float16,
    "shares": torch.float32,
    "tiles": torch.int8,
    "outside": torch.float32,
    "order": torch.int32,
}
_OPTIONAL = ("shares", "tiles", "outside", "order")
_MIXUP_ALPHA = 0.8


@dataclass(frozen=True)
class ViewStyle:
    """How views are drawn. The defaults are SRe2L's for ImageNet-1K.

    Args:
        min_scale: smallest area of a random resized crop as a share of the image's.
        padding: pixels of black on every side, from which a crop of the image's size is cut, in place of a resized one.
        mix: ``cutmix`` with alpha 1, ``mixup`` with alpha 0.8, or ``none``: what is done with another image's view.
        tiles: along a side, whose columns and then rows are shuffled before the crop (RDED).
        batch_size: images of a student's batch, which are mixed among themselves with one box, or one share, for all.

    Raises:
        UserError: a setting is out of range or unknown.
    """

    min_scale: float = 0.08
    padding: int = 0
    mix: str = "cutmix"
    tiles: int = 1
    batch_size: int = 1024

    def __post_init__(self) -> None:
        check_range("in (0, 1]", "labels.", min_scale=self.min_scale)
        check_range("at least 0", "labels.", padding=self.padding)
        check_range("at least 1", "labels.", tiles=self.tiles)
        if self.mix not in (known := ("cutmix", "mixup", "none")):
            raise unknown_name("labels.mix", self.mix, known)


@dataclass(frozen=True)
class SoftViews:
    """E epochs of views of n images, and the teacher's logits of each.

    A view is a crop brought back to full size, perhaps mirrored, with a box of another image's view pasted in
    (CutMix, Yun et al. 2019) or blended with it (mixup, Zhang et al. 2018). Views are made in normalised space.

    Args:
        crops: ``(E, n, 4)`` float32: left, top, width, height as shares of the sides.
        flips: ``(E, n)`` bool: mirrored left to right after the crop.
        partners: ``(E, n)`` int32: the row whose view of the same epoch is pasted in.
        pastes: ``(E, n, 4)`` int16: left, top, right, bottom of the box in pixels, the last two excluded; nothing is
            pasted where the box is empty.
        logits: ``(E, n, num_classes)`` float16: the teacher's answers.
        shares: ``(E, n)`` float32: how much of the own view is in a blend with the partner's; ``None`` blends nothing.
        tiles: ``(E, n, 2, f)`` int8: the order of f columns, and that of f rows, before the crop; ``None`` keeps it.
        outside: ``(C,)`` float32: normalised values beyond the border of an image; ``None`` where no crop goes there.
        order: ``(E, n)`` int32: the rows of an epoch as students see them, so that those which were mixed with one box
            are in one batch, whatever the student's seed (as FKD's replay is); ``None`` leaves it to the students.

    Raises:
        UserError: shapes or types disagree, or a number is not finite or out of range.
    """

    crops: Tensor
    flips: Tensor
    partners: Tensor
    pastes: Tensor
    logits: Tensor
    shares: Tensor | None = None
    tiles: Tensor | None = None
    outside: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        crops, logits = self.crops, self.logits
        if crops.ndim != 3 or len(crops) == 0 or logits.ndim != 3:
            raise UserError(f"views: shapes disagree: crops {tuple(crops.shape)}, logits {tuple(logits.shape)}")
        place = tuple(crops.shape[:2])
        rest = {"crops": (4,), "pastes": (4,), "logits": logits.shape[2:]}
        if self.tiles is not None:
            rest["tiles"] = (2, self.tiles.shape[-1])
        for name, value in self.state_dict().items():
            shape, dtype = (*place, *rest.get(name, ())), _DTYPES[name]
            shape = value.shape[:1] if name == "outside" else shape
            if value.shape != shape or value.dtype != dtype:
                raise UserError(f"views: {name} must be {shape} {dtype}, got {tuple(value.shape)} {value.dtype}")
        if not bool(torch.isfinite(crops).all() and torch.isfinite(logits).all()):
            raise UserError("views: crops or logits hold NaN or infinite values")
        inside = not bool((crops[..., :2] < 0).any() or (crops[..., :2] + crops[..., 2:] > 1.001).any())
        if bool((crops[..., 2:] <= 0).any()) or not (inside or self.outside is not None):
            raise UserError("views: a crop lies outside its image")
        if self.tiles is not None:
            every = torch.arange(self.tiles.shape[-1], device=self.tiles.device)
            if bool((self.tiles.sort(-1).values != every).any()):
                raise UserError("views: an order of tiles is no permutation")
        if self.order is not None:
            every = torch.arange(place[1], device=self.order.device)
            if bool((self.order.sort(-1).values != every).any()):
                raise UserError("views: an order of rows is no permutation")
        if bool((self.partners < 0).any() or (self.partners >= place[1]).any()):
            raise UserError(f"views: a partner is none of the {place[1]} rows")

    @property
    def epochs(self) -> int:
        """Stored epochs E; later ones start over."""
        return len(self.crops)

    def __len__(self) -> int:
        """Images n."""
        return self.crops.shape[1]

    def replay(self, images: Tensor, epoch: int | Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Make views again, with what the teacher said of them.

        Args:
            images: all images ``(n, C, H, W)``, normalised, on the views' device.
            epoch: counted from 0, modulo E; a tensor ``(B,)`` gives every row its own.
            rows: ``(B,)`` int64.

        Returns:
            Views ``(B, C, H, W)`` and logits ``(B, num_classes)`` float32.
        """
        return self.look(images, epoch, rows), self.logits[epoch % self.epochs, rows].float()

    def look(self, images: Tensor, epoch: int | Tensor, rows: Tensor) -> Tensor:
        """Make views ``(B, C, H, W)`` again; arguments as for :meth:`replay`."""
        epoch = epoch % self.epochs
        others = self.partners[epoch, rows].long()
        own, pasted = self._cut(images, epoch, rows), self._cut(images, epoch, others)
        if self.shares is not None:
            return torch.lerp(pasted, own, self.shares[epoch, rows].view(-1, 1, 1, 1))
        left, top, right, bottom = (side.view(-1, 1, 1) for side in self.pastes[epoch, rows].unbind(1))
        down = torch.arange(images.shape[2], device=images.device)[:, None]
        across = torch.arange(images.shape[3], device=images.device)
        inside = (across >= left) & (across < right) & (down >= top) & (down < bottom)
        return torch.where(inside[:, None], pasted, own)

    def _cut(self, images: Tensor, epoch: int | Tensor, rows: Tensor) -> Tensor:
        """Return shuffled, cropped and mirrored images, not yet mixed."""
        shown = images[rows] if self.tiles is None else shuffle_tiles(images[rows], self.tiles[epoch, rows].long())
        return resample(shown, self.crops[epoch, rows], self.flips[epoch, rows], self.outside)

    def to(self, device: torch.device | str) -> "SoftViews":
        """Return the views on a device."""
        return SoftViews(**{name: value.to(device) for name, value in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, without those that are not there."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "SoftViews":
        """Rebuild from :meth:`state_dict`."""
        names = {item.name for item in fields(cls)} - {*_OPTIONAL}
        if set(state) - {*_OPTIONAL} != names:
            raise UserError(f"views: expected the tensors {', '.join(sorted(names))}, got {', '.join(sorted(state))}")
        return cls(**dict(state))


def draw_views(
    epochs: int,
    image_shape: tuple[int, int, int],
    rows: int,
    num_classes: int,
    generator: torch.Generator,
    style: ViewStyle = ViewStyle(),
    flip: bool = True,
    outside: Tensor | None = None,
) -> SoftViews:
    """Draw views whose logits are still zeros.

    Every image is cropped and mixed with another one. The box of CutMix covers a share of the image that is uniform in
    [0, 1] before it is cut off at the border; the share of a mixup is from its Beta distribution. As in the official
    code (``mix_aug`` of SRe2L and RDED) both are drawn once for all images of a batch.

    Args:
        epochs: E.
        image_shape: ``(C, H, W)``.
        rows: n.
        num_classes: logits per view.
        generator: CPU generator.
        style: of crops and mixtures.
        flip: mirror with probability 1/2.
        outside: ``(C,)``, normalised black, which images are padded with; ``None`` pads with their mean, 0.

    Raises:
        UserError: the tiles do not divide the image.
    """
    height, width = image_shape[1:]
    if height % style.tiles or width % style.tiles:
        raise UserError(f"labels.tiles={style.tiles} do not divide images of {(height, width)} pixels")
    crops = _crops(epochs * rows, (height, width), style, generator)
    flips = torch.rand(epochs, rows, generator=generator) < (0.5 if flip else 0.0)
    order = torch.rand(epochs, rows, generator=generator).argsort(1)
    batches = torch.arange(rows) // style.batch_size
    others = (torch.rand(epochs, rows, generator=generator, dtype=torch.float64) + batches).argsort(1)
    partners = torch.empty_like(order).scatter_(1, order, order.gather(1, others))  # a permutation of each batch
    drawn, batch_of = (epochs, int(batches[-1]) + 1), batches[order.argsort(1)]
    pastes, shares = torch.zeros(epochs, rows, 4, dtype=torch.int16), None
    if style.mix == "cutmix":
        pastes = _boxes(height, width, drawn, generator).gather(1, batch_of[:, :, None].expand(epochs, rows, 4))
    if style.mix == "mixup":
        seeded = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        shares = torch.from_numpy(seeded.beta(_MIXUP_ALPHA, _MIXUP_ALPHA, drawn)).float().gather(1, batch_of)
    orders = None
    if style.tiles > 1:
        orders = torch.rand(epochs, rows, 2, style.tiles, generator=generator).argsort(-1).to(torch.int8)
    return SoftViews(
        crops=crops.view(epochs, rows, 4),
        flips=flips,
        partners=partners.int(),
        pastes=pastes,
        logits=torch.zeros(epochs, rows, num_classes, dtype=torch.float16),
        shares=shares,
        tiles=orders,
        outside=(torch.zeros(image_shape[0]) if outside is None else outside) if style.padding else None,
        order=None if style.mix == "none" else order.int(),
    )


def _crops(count: int, sides: tuple[int, int], style: ViewStyle, generator: torch.Generator) -> Tensor:
    if style.padding:
        return draw_padded(count, sides, style.padding, generator)
    return draw_crops(count, sides, style.min_scale, generator)


def _boxes(height: int, width: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw the boxes of CutMix, ``(*shape, 4)`` int16."""
    share = torch.rand(shape, generator=generator).sqrt()
    sides = []
    for side in (width, height):
        half = (share * side).int() // 2
        centre = (torch.rand(shape, generator=generator) * side).int()
        sides.append(((centre - half).clamp(min=0), (centre + half).clamp(max=side)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 2).to(torch.int16)


def shuffle_tiles(images: Tensor, orders: Tensor) -> Tensor:
    """Put columns and then rows of tiles into another order, as RDED's ``ShufflePatches`` does.

    Args:
        images: ``(N, C, H, W)``.
        orders: ``(N, 2, f)`` int64: which column, and which row, stands at each place.

    Example:
        >>> shuffle_tiles(torch.arange(4.0).view(1, 1, 2, 2), torch.tensor([[[1, 0], [0, 1]]]))
        tensor([[[[1., 0.],
                  [3., 2.]]]])
    """
    for axis, order in ((3, orders[:, 0]), (2, orders[:, 1])):
        side = images.shape[axis] // order.shape[1]
        places = (order[:, :, None] * side + torch.arange(side, device=images.device)).flatten(1)
        shape = [len(images), 1, 1, 1]
        shape[axis] = -1
        images = images.gather(axis, places.view(shape).expand_as(images))
    return images


class SyntheticBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """An epoch of shuffled batches of a small set that lives on the device; each rank gets its share of a batch.

    Batch k is a function of seed and k alone, so a resumed run that starts at k continues exactly. A set with views
    is seen through them: pass e over the set takes its stored epoch e, in the stored order if there is one.

    Args:
        images: ``(n, C, H, W)``, normalised.
        labels: ``(n, num_classes)``.
        batch_size: rows per batch and rank; together the ranks use at most the whole set.
        steps: batches in the epoch.
        seed: of the order.
        start: batches already used.
        rank: this process.
        world_size: number of processes.
        views: of the images, on their device; their logits then stand for ``labels``.

    Raises:
        UserError: there are more processes than images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        views: SoftViews | None = None,
    ) -> None:
        if world_size > len(images):
            raise UserError(f"{world_size} processes cannot share {len(images)} synthetic images")
        self.images, self.labels = images, labels
        self.rows_per_step = batch_size * world_size
        self.steps, self.seed, self.start = steps, seed, start
        self.rank, self.world_size, self.views = rank, world_size, views

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = make_generator(self.seed, "order", device=self.images.device)
        stream = ShuffledStream(len(self.images), self.rows_per_step, order)
        stream.skip(self.start)
        stored = self.views.order if self.views is not None else None
        for step in range(self.start, self.start + self.steps):
            epoch, place = divmod(step, stream.size // stream.batch_size)
            part = slice(place * stream.batch_size, (place + 1) * stream.batch_size)
            batch = stream.next() if stored is None else stored[epoch % len(stored), part]
            rows = batch[self.rank :: self.world_size].long()
            if self.views is None:
                yield self.images[rows], self.labels[rows]
            else:
                yield self.views.replay(self.images, epoch, rows)

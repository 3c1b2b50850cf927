"""A split as read from disk, as rows are drawn from it, and as a batch that was drawn; and the facts of the data."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dd.augment.crops import draw_crops, resample
from lightning_dd.data.preprocess import Preprocessing, to_unit

Rows = Tensor | slice
"""Which images: int64 indices ``(B,)``, a mask ``(N,)``, or a slice."""

_BLOCK = 4096  # images normalised at a time; fewer of those larger than 32 x 32 x 3
_FEWEST = 32  # rows per thread: handing over fewer takes longer than reading them


@dataclass(frozen=True)
class DataFacts:
    """What a model needs to know of the data: plain values, which go into checkpoints and the distilled-set file."""

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """``(channels, height, width)``."""
    preprocessing: str
    """In words: ``standardise``, ``zca``, ``zca in 2x2 blocks``."""
    fingerprint: str
    """Hash of the training pixels and labels (before preprocessing, so the same on every machine)."""
    mirror: bool = True
    """Whether an image keeps its meaning when it is mirrored left to right; digits do not."""

    def __str__(self) -> str:
        shown = ", ".join(self.class_names[:10]) + (f" and {len(self.class_names) - 10} more" * (self.num_classes > 10))
        channels, height, width = self.image_shape
        form = f"{width}x{height} with {channels} channel(s)"
        return f"{form}, {self.num_classes} classes ({shown}), {self.preprocessing}"

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for a checkpoint or a JSON header."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataFacts":
        """Rebuild from :meth:`to_dict`."""
        return cls(**(values | {name: tuple(values[name]) for name in ("class_names", "image_shape")}))


class RawSplit(NamedTuple):
    """One decoded split: pixels as the reader found them."""

    images: Tensor
    """``(N, C, H, W)``, uint8 or float in [0, 1]; may lie in a memory-mapped file."""
    labels: Tensor
    """``(N,)`` int64 in ``[0, num_classes)``."""
    class_names: tuple[str, ...]
    """Name of each label, in label order."""

    def take(self, rows: Tensor) -> "RawSplit":
        """Return these rows ``(B,)`` as a split of their own."""
        return RawSplit(self.images[rows], self.labels[rows], self.class_names)


class Batch(NamedTuple):
    """Images that were drawn, and their classes."""

    images: Tensor
    """``(B, C, H, W)`` float32, normalised."""
    labels: Tensor
    """``(B,)`` int64."""


class Split:
    """One split of a real data set: pixels and classes. Images are normalised when their rows are drawn.

    Wherever the pixels lie (on the accelerator, in main memory, in a memory-mapped file), rows are drawn the same way.
    Reading has no random numbers and no order of its own, so results do not depend on the number of threads.

    Args:
        source: pixels ``(M, C, H, W)``, uint8 or float in [0, 1]; may lie in a memory-mapped file.
        labels: ``(N,)`` int64, on the device on which rows should be drawn.
        preprocessing: from pixels in [0, 1] to normalised images; ``None`` takes the pixels as they are.
        device: where batches go.
        threads: that read the rows announced by :meth:`read_ahead`; 0 reads when asked.
        keep_normalised: normalise all images once and keep them in float32: worth its memory where whitening a batch
            takes as long as learning from it, as ZCA does on a CPU.
        rows: ``(N,)`` int64, the rows of ``source`` that make up this split, where ``source`` lies; ``None`` is all.
        class_names: one per class, for messages.

    Example:
        >>> pixels = torch.arange(8, dtype=torch.uint8).view(4, 1, 1, 2)
        >>> split = Split(pixels, torch.tensor([0, 1, 0, 1]), Preprocessing([0.5], [0.1]))
        >>> split.take(torch.tensor([0, 2])).images.shape
        torch.Size([2, 1, 1, 2])
    """

    def __init__(
        self,
        source: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
        threads: int = 0,
        keep_normalised: bool = False,
        rows: Tensor | None = None,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.labels, self.class_names = labels, class_names
        self.device = torch.device(device)
        self.threads = threads
        self.preprocessing = preprocessing and preprocessing.to(self.device)
        self._source = source
        self._rows = torch.arange(len(source), device=source.device) if rows is None else rows
        self.whole: Callable[[Tensor], Iterator[Tensor]] | None = None
        """From rows ``(B,)`` in rising order to their images as the files hold them, uint8 ``(C, h, w)`` of any size;
        ``None`` where :meth:`pixels` are those of the files."""
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[Tensor, Tensor, list[Future[Tensor]]] | None = None
        self._kept = self._normalise_all() if keep_normalised else None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        channels, height, width = self._source.shape[1:]
        return channels, height, width

    def take(self, rows: Rows, device: torch.device | str | None = None) -> Batch:
        """Return these rows normalised, on the split's own device unless another is named."""
        target = self.device if device is None else torch.device(device)
        images = self._normalise(self.pixels(rows)) if self._kept is None else _at(self._kept, rows)
        return Batch(images.to(target), _at(self.labels, rows).to(target))

    def everything(self) -> Batch:
        """Return all rows normalised, in memory at once."""
        return self.take(slice(None))

    def pixels(self, rows: Rows) -> Tensor:
        """Return these rows as pixels ``(B, C, H, W)`` in [0, 1], float32, on the split's device."""
        places = _at(self._rows, rows)
        ahead, self._ahead = self._ahead, None
        if ahead is None or not torch.equal(ahead[0], places):
            return to_unit(self._source.index_select(0, places).to(self.device))
        for reading in ahead[2]:
            reading.result()
        return to_unit(ahead[1].to(self.device, non_blocking=True))

    def through(self, preprocessing: Preprocessing) -> "Split":
        """Return the same pixels and classes through another map, normalised as they are drawn."""
        return Split(self._source, self.labels, preprocessing, self.device, self.threads, rows=self._rows)

    def only(self, rows: Tensor) -> "Split":
        """Return these rows ``(B,)``, or those of a mask ``(N,)``, as a split of their own."""
        source, labels, places = self._source, _at(self.labels, rows), _at(self._rows, rows)
        return Split(source, labels, self.preprocessing, self.device, self.threads, rows=places)

    def read_ahead(self, rows: Rows) -> None:
        """Begin to read rows that will be drawn next; nothing but time depends on it."""
        if self.threads == 0 or self._kept is not None:
            return
        places, source = _at(self._rows, rows), self._source
        with torch.inference_mode(mode=False):  # threads are outside it, and may not write to what is made inside
            pinned = self.device.type == "cuda"
            buffer = torch.empty((len(places), *source.shape[1:]), dtype=source.dtype, pin_memory=pinned)
        self._pool = self._pool or ThreadPoolExecutor(self.threads, thread_name_prefix="read-images")
        count = min(self.threads, max(1, len(places) // _FEWEST))
        parts = zip(places.tensor_split(count), buffer.tensor_split(count), strict=True)
        readings = [self._pool.submit(torch.index_select, source, 0, some, out=out) for some, out in parts]
        self._ahead = places, buffer, readings

    def _normalise(self, pixels: Tensor) -> Tensor:
        return pixels if self.preprocessing is None else self.preprocessing(pixels)

    def _normalise_all(self) -> Tensor:
        step = max(1, min(_BLOCK, _BLOCK * 3072 // self._source.shape[1:].numel()))
        images = torch.empty((len(self), *self.image_shape), device=self.device)
        for start in range(0, len(self), step):
            part = slice(start, start + step)
            images[part] = self._normalise(self.pixels(part))
        return images


def _at(values: Tensor, rows: Rows) -> Tensor:
    return values[rows if isinstance(rows, slice) else rows.to(values.device)]


class Patches(Split):
    """A split of whose images random square crops are drawn, brought to full size: the pool that RDED chooses from.

    Args:
        split: the whole images.
        generator: CPU generator.
        min_scale: smallest area of a crop as a share of the image's.
    """

    def __init__(self, split: Split, generator: torch.Generator, min_scale: float = 0.25) -> None:
        self.__dict__.update(split.__dict__ | {"_kept": None})  # crops are made of pixels, and normalised afterwards
        self._generator, self._min_scale = generator, min_scale

    def pixels(self, rows: Rows) -> Tensor:
        """Return crops of these rows as pixels ``(B, C, H, W)`` in [0, 1], float32, on the split's device."""
        pixels = super().pixels(rows)
        sides = pixels.shape[2], pixels.shape[3]
        crops = draw_crops(len(pixels), sides, self._min_scale, self._generator, ratio=1.0).to(pixels.device)
        return resample(pixels, crops, torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device))

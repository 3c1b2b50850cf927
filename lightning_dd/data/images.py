"""What a split is: as read from disk, as rows are drawn from it, and as a batch that was drawn."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dd.data.preprocess import Preprocessing, to_unit

Rows = Tensor | slice
"""Which images: int64 indices ``(B,)``, a mask ``(N,)``, or a slice."""

_BLOCK = 4096  # images normalised at a time; fewer of those larger than 32 x 32 x 3
_FEWEST = 32  # rows per thread: handing over fewer takes longer than reading them


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


class PixelRows:
    """Some rows of a pixel tensor, without a copy: how a split refers to what was read.

    Args:
        pixels: ``(M, C, H, W)``, uint8 or float in [0, 1]; may lie in a memory-mapped file.
        rows: ``(N,)`` int64 indices of the rows meant, on the pixels' device.

    Example:
        >>> kept = PixelRows(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([1, 3]))
        >>> len(kept), kept[1:].flatten()
        (2, tensor([3], dtype=torch.uint8))
    """

    def __init__(self, pixels: Tensor, rows: Tensor) -> None:
        self.pixels = pixels
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        """``(N, C, H, W)``."""
        return torch.Size([len(self.rows), *self.pixels.shape[1:]])

    def places(self, rows: Rows) -> Tensor:
        """Return where rows of this selection lie in the pixel tensor: int64 ``(B,)``."""
        return self.rows[rows if isinstance(rows, slice) else rows.to(self.rows.device)]

    def __getitem__(self, rows: Rows) -> Tensor:
        return self.pixels.index_select(0, self.places(rows))


class _Reading(NamedTuple):
    """Rows that threads are gathering."""

    places: Tensor
    pixels: Tensor
    parts: "Sequence[Future[Tensor]]"


class Split:
    """One split of a real data set: pixels and classes. Images are normalised when their rows are drawn.

    Wherever the pixels lie (on the accelerator, in main memory, in a memory-mapped file), rows are drawn the same way,
    and on a CPU standardised images come out the same bit for bit. Reading has no random numbers and no order of its
    own, so results do not depend on the number of threads.

    Args:
        pixels: what was read, or rows of it.
        labels: ``(N,)`` int64, on the device on which rows should be drawn.
        preprocessing: from pixels in [0, 1] to normalised images; ``None`` takes the pixels as they are.
        device: where batches go.
        threads: that read the rows announced by :meth:`read_ahead`; 0 reads when asked.
        keep_normalised: normalise all images once and keep them in float32: worth its memory where whitening a batch
            takes as long as learning from it, as ZCA does on a CPU.

    Example:
        >>> pixels = torch.arange(8, dtype=torch.uint8).view(4, 1, 1, 2)
        >>> split = Split(PixelRows(pixels, torch.arange(4)), torch.tensor([0, 1, 0, 1]), Preprocessing([0.5], [0.1]))
        >>> split.take(torch.tensor([0, 2])).images.shape
        torch.Size([2, 1, 1, 2])
    """

    def __init__(
        self,
        pixels: PixelRows,
        labels: Tensor,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
        threads: int = 0,
        keep_normalised: bool = False,
    ) -> None:
        self.labels = labels
        self.device = torch.device(device)
        self.threads = threads
        self.preprocessing = preprocessing and preprocessing.to(self.device)
        self._source = pixels
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: _Reading | None = None
        self._kept = self._normalise_all() if keep_normalised else None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        channels, height, width = self._source.shape[1:]
        return channels, height, width

    def take(self, rows: Rows, device: torch.device | str | None = None) -> Batch:
        """Return these rows normalised.

        Args:
            rows: indices ``(B,)``, a mask ``(N,)`` or a slice.
            device: where the batch shall be; ``None`` is the split's own.
        """
        target = self.device if device is None else torch.device(device)
        labels = self.labels[rows if isinstance(rows, slice) else rows.to(self.labels.device)]
        if self._kept is not None:
            images = self._kept[rows if isinstance(rows, slice) else rows.to(self.device)]
        else:
            images = self._normalise(self.pixels(rows))
        return Batch(images.to(target), labels.to(target))

    def everything(self) -> Batch:
        """Return all rows normalised, in memory at once."""
        return self.take(slice(None))

    def pixels(self, rows: Rows) -> Tensor:
        """Return these rows as pixels ``(B, C, H, W)`` in [0, 1], float32, on the split's device."""
        places = self._source.places(rows)
        ahead, self._ahead = self._ahead, None
        if ahead is None or not torch.equal(ahead.places, places):
            return to_unit(self._source.pixels.index_select(0, places).to(self.device))
        for part in ahead.parts:
            part.result()
        return to_unit(ahead.pixels.to(self.device, non_blocking=True))

    def through(self, preprocessing: Preprocessing) -> "Split":
        """Return the same pixels and classes through another map, normalised as they are drawn."""
        return Split(self._source, self.labels, preprocessing, self.device, self.threads)

    def read_ahead(self, rows: Rows) -> None:
        """Begin to read rows that will be drawn next; nothing but time depends on it."""
        if self.threads == 0 or self._kept is not None:
            return
        places, source = self._source.places(rows), self._source.pixels
        with torch.inference_mode(mode=False):  # threads are outside it, and may not write to what is made inside
            pinned = self.device.type == "cuda"
            buffer = torch.empty((len(places), *source.shape[1:]), dtype=source.dtype, pin_memory=pinned)
        self._pool = self._pool or ThreadPoolExecutor(self.threads, thread_name_prefix="read-images")
        count = min(self.threads, max(1, len(places) // _FEWEST))
        parts = zip(places.tensor_split(count), buffer.tensor_split(count), strict=True)
        submit = self._pool.submit
        reads = [submit(torch.index_select, source, 0, some, out=out) for some, out in parts]
        self._ahead = _Reading(places, buffer, reads)

    def _normalise(self, pixels: Tensor) -> Tensor:
        return pixels if self.preprocessing is None else self.preprocessing(pixels)

    def _normalise_all(self) -> Tensor:
        images = torch.empty(self._source.shape, device=self.device)
        step = max(1, min(_BLOCK, _BLOCK * 3072 // self._source.shape[1:].numel()))
        for start in range(0, len(self), step):
            part = slice(start, start + step)
            images[part] = self._normalise(to_unit(self._source[part].to(self.device)))
        return images

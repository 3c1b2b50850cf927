"""Images that do not fit on the device: read when they are indexed, by threads, one batch ahead where it is known."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dd.data.preprocess import to_unit
from lightning_dd.errors import UserError

Rows = Tensor | slice
"""Which images: int64 indices ``(B,)``, a mask ``(N,)``, or a slice."""

_FEWEST = 32  # rows per thread: handing over fewer takes longer than reading them


class PixelRows:
    """Some rows of a pixel tensor, without a copy: how a split refers to what was read.

    Args:
        pixels: ``(M, C, H, W)``, uint8 or float in [0, 1], on the CPU; may lie in a memory-mapped file.
        rows: ``(N,)`` int64 indices of the rows meant.

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

    def __getitem__(self, rows: Rows) -> Tensor:
        return self.pixels.index_select(0, self.rows[rows])


class _Reading(NamedTuple):
    """Rows that threads are gathering."""

    rows: Tensor
    pixels: Tensor
    parts: Sequence["Future[Tensor]"]
    images: "Future[Tensor] | None" = None
    """The pixels normalised, where that is done ahead as well."""

    def gathered(self) -> Tensor:
        for part in self.parts:
            part.result()
        return self.pixels


class StreamedImages(Tensor):
    """Normalised images ``(N, C, H, W)`` float32 that exist only as far as they are indexed.

    To torch this is a tensor with shape, type and device but without memory. ``images[rows]`` gives an ordinary
    tensor on that device: rows are gathered by threads, into pinned memory where the device is a GPU, copied and
    only there turned into floats and normalised. Any other operation is refused, because it would need all images at
    once. So what draws rows works with it unchanged, and what does not is told which setting to change.

    Reading has no random numbers and no order of its own: results do not depend on the number of threads.

    Args:
        source: where the pixels lie.
        normalise: map from pixels in [0, 1] to normalised images, on ``device``.
        device: where batches go.
        workers: threads that read; 0 reads when asked, without threads.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102
        cls: type["StreamedImages"],
        source: PixelRows,
        normalise: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> "StreamedImages":
        made: StreamedImages = torch.Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=torch.float32, device=torch.device(device)
        )
        return made

    def __init__(
        self,
        source: PixelRows,
        normalise: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        super().__init__()
        self._source, self._normalise, self._workers = source, normalise, workers
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: _Reading | None = None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StreamedImages(shape={tuple(self.shape)}, device='{self.device}')"

    def __getitem__(self, rows: Any) -> Tensor:
        """Read rows: ``(B, C, H, W)`` float32, normalised, on the device."""
        if not isinstance(rows, slice) and not (isinstance(rows, Tensor) and rows.ndim == 1):
            raise self._refusal(f"indexing by {type(rows).__name__}")
        chosen = self._source.rows[rows if isinstance(rows, slice) else rows.cpu()]
        ahead, self._ahead = self._ahead, None
        if ahead is None or not torch.equal(ahead.rows, chosen):
            ahead = self._read(chosen)
        return self._finish(ahead) if ahead.images is None else ahead.images.result()

    def read_ahead(self, rows: Rows) -> None:
        """Begin to read rows that will be indexed next; nothing but time depends on it."""
        if self._workers == 0:
            return
        reading = self._read(self._source.rows[rows if isinstance(rows, slice) else rows.cpu()])
        if self.device.type == "cpu":  # a GPU normalises in no time, and in the order of its own stream
            assert self._threads is not None
            reading = reading._replace(images=self._threads.submit(self._finish, reading))
        self._ahead = reading

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "StreamedImages":
        """Return the same images with ``function`` applied after normalising."""
        normalise = self._normalise
        return StreamedImages(
            self._source, lambda pixels: function(normalise(pixels)), self.device, workers=self._workers
        )

    def _finish(self, reading: _Reading) -> Tensor:
        """Copy gathered pixels to the device and normalise them, all rows at once."""
        return self._normalise(to_unit(reading.gathered().to(self.device, non_blocking=True)))

    def _read(self, chosen: Tensor) -> _Reading:
        """Start gathering rows of the pixel tensor into a buffer of their own."""
        pixels = self._source.pixels
        with torch.inference_mode(mode=False):  # threads are outside it, and may not write to what is made inside
            buffer = torch.empty(
                (len(chosen), *pixels.shape[1:]), dtype=pixels.dtype, pin_memory=self.device.type == "cuda"
            )
            if self._workers == 0:
                torch.index_select(pixels, 0, chosen, out=buffer)
                return _Reading(chosen, buffer, [])
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="read-images")
        count = min(self._workers, max(1, len(chosen) // _FEWEST))
        parts = zip(chosen.tensor_split(count), buffer.tensor_split(count), strict=True)
        submit = self._threads.submit
        return _Reading(chosen, buffer, [submit(torch.index_select, pixels, 0, rows, out=out) for rows, out in parts])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise cls._refusal(str(func))

    @staticmethod
    def _refusal(what: str) -> UserError:
        return UserError(
            f"the real images are streamed and can only be drawn by rows, but this step asks for all of them at once "
            f"({what}): set data.keep_on_device=true and data.on_disk=false"
        )

"""The decoder that every reader of image files shares."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_dd.utils.errors import UserError

_TASK = 64  # images per task: one small JPEG takes less time than handing it to a thread
_ROUND = 2048  # images in flight, so that encoded bytes do not pile up

PixelArray = npt.NDArray[np.uint8]
"""Pixels as the decoder handles them: ``(C, H, W)`` or ``(N, C, H, W)``."""
Allocate = Callable[[tuple[int, ...]], PixelArray]
"""Makes the array for the pixels of a split, given its shape: in memory, or in a memory-mapped file."""


def new_pixels(shape: tuple[int, ...]) -> PixelArray:
    """Return an array in memory, not filled."""
    return np.empty(shape, np.uint8)


def check_image_size(image_size: int) -> None:
    """Refuse a side of less than one pixel.

    Raises:
        UserError: it is.
    """
    if image_size < 1:
        raise UserError(f"data.image_size must be at least 1, got {image_size}")


def decode_images(
    sources: Iterable[tuple[str, bytes | Path]],
    count: int,
    image_size: int | None = None,
    channels: int | None = None,
    allocate: Allocate = new_pixels,
) -> Tensor:
    """Decode encoded images in a pool of threads.

    Args:
        sources: for each image, how an error should call it, and its bytes or its file.
        count: how many there are, at least 1.
        image_size: side of the result (short side resized, centre cropped); ``None`` keeps the size, which must
            then be the same throughout.
        channels: 1 or 3; ``None`` gives 1 if all images are grayscale, else 3.
        allocate: called once, with the shape of the result, for the array to decode into.

    Returns:
        uint8 ``(count, channels, H, W)``, in the order of ``sources``.

    Raises:
        UserError: an image cannot be decoded or the sizes differ.
    """

    def decode_task(task: Sequence[tuple[str, bytes | Path]]) -> list[tuple[PixelArray, bool]]:
        return [_decode(where, payload, image_size, channels) for where, payload in task]

    remaining = iter(sources)
    pixels: PixelArray | None = None
    all_grey, position = True, 0
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(remaining, _ROUND)):
            tasks = [batch[start : start + _TASK] for start in range(0, len(batch), _TASK)]
            decoded = (image for images in pool.map(decode_task, tasks) for image in images)
            for (where, _), (image, grey) in zip(batch, decoded, strict=True):
                if pixels is None:
                    pixels = allocate((count, *image.shape))
                if image.shape != pixels.shape[1:]:
                    raise UserError(_sizes_differ(where, image, pixels))
                pixels[position] = image
                all_grey, position = all_grey and grey, position + 1
    assert pixels is not None
    assert position == count
    images = torch.from_numpy(pixels)
    return images[:, :1].clone() if channels is None and all_grey else images


def _decode(where: str, payload: bytes | Path, image_size: int | None, channels: int | None) -> tuple[PixelArray, bool]:
    """Decode one image to ``(C, H, W)`` and say whether it was grayscale."""
    try:
        with Image.open(payload if isinstance(payload, Path) else BytesIO(payload)) as opened:
            if opened.mode.startswith(("I", "F")):  # Pillow would clip these to 255 without a word
                raise ValueError(f"mode {opened.mode} has more than 8 bits per channel")
            grey = opened.mode in ("1", "L", "LA")
            image = opened.convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError:  # its message shows a memory address instead of the cause
        raise UserError(f"cannot decode the image {where}: not a known image format") from None
    except Exception as error:  # Pillow's plugins raise whatever they like on broken files, SyntaxError included
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot decode the image {where}: {reason}") from error
    if image_size is not None:
        image = _resize_and_crop(image, image_size)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1), grey


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Do what torchvision's ``Resize(size)`` and ``CenterCrop(size)`` do to a PIL image."""
    width, height = image.size
    if min(width, height) != size:
        scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    width, height = image.size
    if width == height:
        return image
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _sizes_differ(where: str, image: PixelArray, pixels: PixelArray) -> str:
    return (
        f"the images differ in size ({where} is {image.shape[2]}x{image.shape[1]}, the first one "
        f"{pixels.shape[3]}x{pixels.shape[2]}); set data.image_size to bring them to one size"
    )

"""Images in one folder per class, and the decoder that every reader of image files shares."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.model_selection import train_test_split
from torch import Tensor

from lightning_dd.data.base import RawSplit
from lightning_dd.data.cache import CachedData, content_key
from lightning_dd.errors import UserError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
"""Files that count as images, whatever the case of their letters; all others are passed over."""
HELD_OUT = 0.2
"""Share of train that serves as the test split where the folder has none."""
SPLIT_SEED = 20240
"""Seed of that split; part of the data set's definition, never an argument."""

_TASK = 64  # images per task: one small JPEG takes less time than handing it to a thread
_ROUND = 2048  # images in flight, so that encoded bytes do not pile up

_Pixels = npt.NDArray[np.uint8]


class ImageFolder(CachedData):
    """Images sorted into ``root/train/<class>/`` and ``root/test/<class>/``.

    The test split is ``root/test``; if there is none ``root/val`` (with both, ``val`` is not used); if there is
    neither, a fixed, stratified 20 % of ``root/train`` is cut off and is the test split. Class names are the
    sorted folder names of ``root/train``; images may lie deeper inside a class folder. Pixels are uint8
    ``(channels, image_size, image_size)``: the short side is resized to ``image_size`` (bilinear,
    anti-aliased), then the centre is cropped. Channel statistics are measured on the training split.

    Args:
        root: folder that holds ``train``.
        image_size: side of the square images, in pixels.
        channels: 3 for RGB, 1 for grayscale; files of the other kind are converted.
        **kwargs: the other arguments of :class:`~lightning_dd.data.base.RealData`.

    Raises:
        UserError: an argument is out of range, or (in ``setup``) folders are missing or an image is broken.
    """

    def __init__(self, root: str, image_size: int, channels: Literal[1, 3] = 3, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        if channels not in (1, 3):
            raise UserError(f"data.channels must be 1 or 3, got {channels}")
        check_image_size(image_size)
        self.folder = Path(root).expanduser()
        self.image_size = image_size
        self.channels = channels

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data, all but ``root``."""
        return super().spec() | {"image_size": self.image_size, "channels": self.channels}

    def source_key(self, *, train: bool) -> str:
        """Return the key of the names, sizes and times of the files (reading them all would take too long)."""
        folder = self._folder(train)
        stamps = [
            (file.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)
            for file, _ in self._files(folder)
            for status in [file.stat()]
        ]
        return content_key("folder", self.image_size, self.channels, self._names(), stamps)

    def decode(self, *, train: bool) -> RawSplit:
        """Decode the folder of the split, uint8 ``(N, channels, image_size, image_size)``."""
        listed = self._files(self._folder(train))
        sources = ((str(file), file) for file, _ in listed)
        images = decode_images(sources, len(listed), self.image_size, self.channels)
        return RawSplit(images, torch.tensor([label for _, label in listed]), self._names())

    def read(self, *, train: bool) -> RawSplit:
        """Return the train or the test split, from the cache where it is there.

        Raises:
            UserError: folders are missing, a class is unknown or an image is broken.
        """
        split = super().read(train=train)
        return split if self._test_folder() is not None else _held_out(split, train, self.root)

    def _test_folder(self) -> Path | None:
        found = (self.folder / name for name in ("test", "val"))
        return next((folder for folder in found if folder.is_dir()), None)

    def _folder(self, train: bool) -> Path:
        folder = self.folder / "train"
        if not folder.is_dir():
            raise UserError(f"data.root='{self.root}' must hold a folder 'train' with one folder per class")
        return folder if train else self._test_folder() or folder

    def _names(self) -> tuple[str, ...]:
        return tuple(_subfolders(self.folder / "train"))

    def _files(self, folder: Path) -> list[tuple[Path, int]]:
        """List the images of a split with their labels, in an order that is the same on every machine."""
        labels = {name: label for label, name in enumerate(self._names())}
        present = _subfolders(folder)
        unknown = [name for name in present if name not in labels]
        if unknown:
            raise UserError(f"data.root: '{folder / unknown[0]}' is a class that '{self.folder / 'train'}' lacks")
        listed = [(file, labels[name]) for name in present for file in _images(folder / name)]
        if not listed:
            raise UserError(f"data.root: no images in '{folder}'; expected '{folder}/<class>/<image>.png' or .jpg")
        return listed


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
) -> Tensor:
    """Decode encoded images in a pool of threads.

    Args:
        sources: for each image, how an error should call it, and its bytes or its file.
        count: how many there are, at least 1.
        image_size: side of the result (short side resized, centre cropped); ``None`` keeps the size, which must
            then be the same throughout.
        channels: 1 or 3; ``None`` gives 1 if all images are grayscale, else 3.

    Returns:
        uint8 ``(count, channels, H, W)``, in the order of ``sources``.

    Raises:
        UserError: an image cannot be decoded or the sizes differ.
    """

    def decode_task(task: Sequence[tuple[str, bytes | Path]]) -> list[tuple[_Pixels, bool]]:
        return [_decode(where, payload, image_size, channels) for where, payload in task]

    remaining = iter(sources)
    pixels: _Pixels | None = None
    all_grey, position = True, 0
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(remaining, _ROUND)):
            tasks = [batch[start : start + _TASK] for start in range(0, len(batch), _TASK)]
            decoded = (image for images in pool.map(decode_task, tasks) for image in images)
            for (where, _), (image, grey) in zip(batch, decoded, strict=True):
                if pixels is None:
                    pixels = np.empty((count, *image.shape), np.uint8)
                if image.shape != pixels.shape[1:]:
                    raise UserError(_sizes_differ(where, image, pixels))
                pixels[position] = image
                all_grey, position = all_grey and grey, position + 1
    assert pixels is not None
    assert position == count
    images = torch.from_numpy(pixels)
    return images[:, :1].clone() if channels is None and all_grey else images


def _decode(where: str, payload: bytes | Path, image_size: int | None, channels: int | None) -> tuple[_Pixels, bool]:
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


def _sizes_differ(where: str, image: _Pixels, pixels: _Pixels) -> str:
    return (
        f"the images differ in size ({where} is {image.shape[2]}x{image.shape[1]}, the first one "
        f"{pixels.shape[3]}x{pixels.shape[2]}); set data.image_size to bring them to one size"
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))


def _images(folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder, sorted by their relative name; hidden files are not images."""
    found = {
        file.relative_to(folder).as_posix(): file
        for file in folder.rglob("*")
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()
    }
    return (found[name] for name in sorted(found))


def _held_out(split: RawSplit, train: bool, root: str | None) -> RawSplit:
    """Cut the test split from train, for folders that have none."""
    try:
        kept, held_out = train_test_split(
            torch.arange(len(split.labels)).numpy(),
            test_size=HELD_OUT,
            stratify=split.labels.numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise UserError(
            f"data.root='{root}' has no folder 'test' or 'val', and no test split can be cut from train: {error}"
        ) from None
    chosen = torch.from_numpy(kept if train else held_out).sort().values
    return RawSplit(split.images[chosen], split.labels[chosen], split.class_names)

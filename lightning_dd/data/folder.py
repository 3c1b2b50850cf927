"""Images in one folder per class."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.model_selection import train_test_split

from lightning_dd.data.base import RawSplit
from lightning_dd.data.cache import CachedData, content_key
from lightning_dd.data.decode import check_image_size, decode_images
from lightning_dd.errors import UserError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
"""Files that count as images, whatever the case of their letters; all others are passed over."""
HELD_OUT = 0.2
"""Share of train that serves as the test split where the folder has none."""
SPLIT_SEED = 20240
"""Seed of that split; part of the data set's definition, never an argument."""


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

"""Images in one folder per class."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_dd.data.cache import Allocate, content_key, new_pixels
from lightning_dd.data.images import RawSplit
from lightning_dd.data.readers import EXTENSIONS, Encoded, EncodedImages, choose_classes, decode_images
from lightning_dd.data.sampling import scarcest, stratified_cut
from lightning_dd.utils.errors import UserError

HELD_OUT = 0.2
"""Share of train that serves as the test split where the folder has none."""
_MOST_SAID = 5  # broken files by name
SPLIT_SEED = 20240
"""Seed of that split; part of the data set's definition, never an argument."""


class ImageFolder(EncodedImages):
    """Images sorted into ``root/train/<class>/`` and ``root/test/<class>/``, or into ``root/<class>/``.

    The test split is ``root/test``; if there is none ``root/val`` (with both, ``val`` is not used); if there is
    neither, a fixed, stratified 20 % of ``root/train`` (or of ``root``) is cut off and is the test split. Class names
    are the sorted folder names of ``root/train``, or those chosen of them, in the order of the choice; images may lie
    deeper inside a class folder. Pixels are uint8 ``(channels, image_size, image_size)``: the short side is resized
    to ``image_size`` (bilinear, anti-aliased), then the centre is cropped. Channel statistics are measured on the
    training split.

    Args:
        root: folder that holds ``train``.
        image_size: side of the square images, in pixels.
        channels: 3 for RGB, 1 for grayscale; files of the other kind are converted.
        photos: turn images as their EXIF says, and lay transparent ones on white.
        skip_broken: leave files out that cannot be decoded, and say so, instead of refusing.
        **kwargs: the other arguments of :class:`~lightning_dd.data.readers.EncodedImages`; ``classes`` are folder names
            or their places in sorted order.

    Raises:
        UserError: an argument is out of range, or (in ``setup``) folders are missing or an image is broken.
    """

    test_folders: ClassVar[Sequence[str]] = ("test", "val")
    """Where the test split is looked for."""

    def __init__(
        self,
        root: str,
        image_size: int,
        channels: Literal[1, 3] = 3,
        photos: bool = True,
        skip_broken: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, image_size=image_size, channels=channels, **kwargs)
        self.folder, self.photos, self.skip_broken = Path(root).expanduser(), photos, skip_broken

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data (never a path)."""
        return super().spec() | {"photos": self.photos, "skip_broken": self.skip_broken}

    def notes(self) -> list[str]:
        """Say where the test split comes from, and what was made of the files or passed over."""
        listed = self._files(True)
        found = [f"short side resized to {self.image_size}, centre cropped"]
        if self._test_folder() is None:
            found.append(f"no folder 'test': a fixed {HELD_OUT:.0%} of each class is the test split")
        used = sum(len(split) for split in (self.train, self.val) if split)
        if skipped := len(listed) - used:
            found.append(f"{skipped} file(s) of {len(listed)} cannot be decoded and are left out")
        if others := self._passed_over():
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            found.append(f"passed over as no images: {', '.join(others[:3])}{more}")
        return found

    def _passed_over(self) -> list[str]:
        """Return the names of visible files in the class folders that are not taken for images."""
        folder = self._train_folder()
        files = (file for name in self._names() for file in sorted((folder / name).rglob("*")) if file.is_file())
        return [file.name for file in files if not _hidden(file) and file.suffix.lower() not in EXTENSIONS]

    def source_key(self, *, train: bool) -> str:
        """Return the key of the names, sizes and times of the files (reading them all would take too long)."""
        stamps = [
            (file.relative_to(self.folder).as_posix(), label, status.st_size, status.st_mtime_ns)
            for file, label in self._files(train)
            for status in [file.stat()]
        ]
        own = [name for name in ("photos", "skip_broken") if getattr(self, name)]
        return content_key("folder", self.size_of(train=train), self.channels, self._names(), stamps, *own)

    def sources(self, rows: Tensor) -> Iterator[Encoded]:
        """Yield the files of these rows of the training split."""
        listed = self._files(True)
        return ((str(file), file) for file, _ in (listed[row] for row in rows.tolist()))

    def decode(self, *, train: bool, allocate: Allocate = new_pixels) -> RawSplit:
        """Decode the folder of the split, uint8 ``(N, channels, image_size, image_size)``."""
        listed = self._files(train)
        broken: dict[int, str] | None = {} if self.skip_broken else None
        size = self.size_of(train=train)
        sources: Iterator[Encoded] = ((str(file), file) for file, _ in listed)
        images = decode_images(sources, len(listed), size, self.channels, allocate, self.photos, broken)
        for text in list((broken or {}).values())[:_MOST_SAID]:
            rank_zero_warn(f"left out: {text}")
        labels = [label for place, (_, label) in enumerate(listed) if place not in (broken or {})]
        return RawSplit(images, torch.tensor(labels), self._names())

    def all_class_names(self) -> tuple[str, ...]:
        """Return the sorted names of the folders in ``train``."""
        return tuple(_subfolders(self._train_folder()))

    def _train_folder(self) -> Path:
        folder = self.folder / "train"
        if folder.is_dir():
            return folder
        if self.folder.is_dir() and self._test_folder() is None and any(map(_images, self._class_folders())):
            return self.folder
        raise UserError(
            f"data.root='{self.root}' must hold a folder 'train' with one folder of images per class, or these folders "
            "themselves: set --data.root (evaluate takes --root)"
        )

    def _class_folders(self) -> list[Path]:
        return [self.folder / name for name in _subfolders(self.folder)]

    def _test_folder(self) -> Path | None:
        found = (self.folder / name for name in self.test_folders)
        return next((folder for folder in found if folder.is_dir()), None)

    def _names(self) -> tuple[str, ...]:
        everything = self.all_class_names()
        return tuple(everything[place] for place in choose_classes(self.classes, everything))

    def _files(self, train: bool) -> list[tuple[Path, int]]:
        """List the images of a split with their labels, in an order that is the same on every machine."""
        test = self._test_folder()
        if test is not None:
            return self._listed(self._train_folder() if train else test)
        listed = self._listed(self._train_folder())
        try:
            kept, held_out = stratified_cut(torch.tensor([label for _, label in listed]), HELD_OUT, SPLIT_SEED)
        except ValueError:
            least = scarcest(torch.tensor([label for _, label in listed]), len(self._names()), self._names())
            missing = f"data.root='{self.root}' has no folder 'test' or 'val'"
            raise UserError(f"{missing}, and no test split can be cut: {least} of {len(listed)}") from None
        return [listed[place] for place in (kept if train else held_out)]

    def _listed(self, folder: Path) -> list[tuple[Path, int]]:
        """List the images below a folder with one folder per class."""
        labels = {name: label for label, name in enumerate(self._names())}
        present, known = _subfolders(folder), self.all_class_names()
        if unknown := [name for name in present if name not in known]:
            raise UserError(f"data.root: '{folder / unknown[0]}' is a class that '{self._train_folder()}' lacks")
        listed = [(file, labels[name]) for name in present if name in labels for file in _images(folder / name)]
        if not listed:
            raise UserError(f"data.root: no images in '{folder}'; expected '{folder}/<class>/<image>.png' or .jpg")
        return listed


def _subfolders(folder: Path) -> list[str]:
    found = (item.name for item in folder.iterdir() if item.is_dir())
    return sorted(name for name in found if not name.startswith(".") and name != "__MACOSX")  # of a zip file


def _images(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by their relative name; hidden files are not images."""
    kept = (file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and not _hidden(file))
    return sorted(filter(Path.is_file, kept), key=lambda file: file.relative_to(folder).as_posix())


def _hidden(file: Path) -> bool:
    return file.name.startswith(".") or file.name in ("Thumbs.db", "desktop.ini")
